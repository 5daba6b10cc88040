//! All behaviour tests of the crate in one program: the model's generic code is compiled for every
//! program that uses it, and each links everything.

mod checkpoint;
mod data;
mod decode;
mod eval_text;
mod generate;
mod gradients;
mod memory;
mod optim;
mod oracle;
mod precision;
mod tokenizer;
mod train;
