//! All behaviour tests of the crate in one program: each program that uses the model compiles it
//! again and links everything, a minute for a dozen of them.

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
