//! Self-contained HTML pages: a template, the style that all pages share, and what the page's
//! script draws as JSON.

use serde::Serialize;

const STYLE: &str = include_str!("page.css");

/// `template` with `/*STYLE*/` and `/*DATA*/` filled in, each of which it has once.
pub fn fill(template: &str, data: &impl Serialize) -> String {
    let json = serde_json::to_string(data).expect("numbers and strings");
    // Inside a script element only `<` can end it.
    let json = json.replace('<', "\\u003c");
    template.replacen("/*STYLE*/\n", STYLE, 1).replacen("/*DATA*/", &json, 1)
}
