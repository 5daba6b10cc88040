//! Annotations as GitHub Actions reads them from a step's output: `::error file=..::message`.
//!
//! Properties and message have escapes of their own, GitHub's: a per cent sign and line ends in
//! both, colon and comma in properties.

use std::fmt;

/// An error that GitHub shows at a file and in the run's summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotation {
    /// The file; GitHub finds it where the path is relative to the checkout.
    pub file: Option<String>,
    /// A few words, shown as its headline.
    pub title: String,
    /// What is wrong, in one line or more.
    pub message: String,
}

impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.as_ref().map(|file| format!("file={},", property(file)));
        let (title, message) = (property(&self.title), data(&self.message));
        write!(f, "::error {}title={title}::{message}", file.unwrap_or_default())
    }
}

fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_annotation_is_one_line_whatever_it_says() {
        let annotation = Annotation {
            file: Some("a,b:100%.safetensors".to_owned()),
            title: "gemm: differs".to_owned(),
            message: "out.d: 50% differ,\r\n::error::the first".to_owned(),
        };
        assert_eq!(
            annotation.to_string(),
            "::error file=a%2Cb%3A100%25.safetensors,title=gemm%3A differs::\
             out.d: 50%25 differ,%0D%0A::error::the first"
        );
        let bare = Annotation { file: None, ..annotation };
        assert!(bare.to_string().starts_with("::error title=gemm%3A differs::"));
    }
}
