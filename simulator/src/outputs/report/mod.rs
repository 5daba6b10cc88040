//! Reports for people: which input matters most, and the self-contained HTML page.

pub mod html;
pub mod sensitivity;
