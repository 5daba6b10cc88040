//! JUnit XML, the form in which continuous integration reads verdicts.
//!
//! Only what its readers agree on is written: `testsuites` of `testsuite`s of `testcase`s with
//! `failure`, `error` or `skipped` inside. XML 1.0 has no character for most control codes, not
//! even escaped: U+FFFD stands for them.

use std::fmt::Write;
use std::time::Duration;

/// How a test ended, in JUnit's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What the case states holds.
    Pass,
    /// It was checked and does not hold; what differs.
    Failure(String),
    /// There is no verdict; why.
    Error(String),
    /// There was nothing to check; why.
    Skipped(String),
}

/// One test: an op, or a case file.
#[derive(Clone, Debug)]
pub struct TestCase {
    /// What it belongs to: the op.
    pub class: String,
    /// Name of the test, unlike any other's of the suite.
    pub name: String,
    /// The file that the test is about, where there is one.
    pub file: Option<String>,
    /// How long it took.
    pub time: Duration,
    /// How it ended.
    pub outcome: Outcome,
}

/// Tests that were run together.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Name of the suite: the command, say.
    pub name: String,
    /// The tests in order.
    pub tests: Vec<TestCase>,
}

const END: &str = "</testsuites>\n";

/// An XML document of these suites, in their order.
pub fn document(suites: &[Suite]) -> String {
    let mut text = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n".to_owned();
    suites.iter().for_each(|suite| write_suite(&mut text, suite));
    text + END
}

/// [`document`]'s text with one more suite at its end; `None` where `text` is no such document.
pub fn append(text: &str, suite: &Suite) -> Option<String> {
    let mut text = text.strip_suffix(END)?.to_owned();
    write_suite(&mut text, suite);
    Some(text + END)
}

fn write_suite(text: &mut String, suite: &Suite) {
    let count = |is: fn(&Outcome) -> bool| suite.tests.iter().filter(|t| is(&t.outcome)).count();
    let time: Duration = suite.tests.iter().map(|t| t.time).sum();
    let _ = writeln!(
        text,
        r#"  <testsuite name="{}" tests="{}" failures="{}" errors="{}" skipped="{}" time="{:.6}">"#,
        escape(&suite.name),
        suite.tests.len(),
        count(|o| matches!(o, Outcome::Failure(_))),
        count(|o| matches!(o, Outcome::Error(_))),
        count(|o| matches!(o, Outcome::Skipped(_))),
        time.as_secs_f64(),
    );
    suite.tests.iter().for_each(|test| write_test(text, test));
    text.push_str("  </testsuite>\n");
}

fn write_test(text: &mut String, test: &TestCase) {
    let file = test.file.as_ref().map(|file| format!(r#" file="{}""#, escape(file)));
    let _ = write!(
        text,
        r#"    <testcase classname="{}" name="{}"{} time="{:.6}""#,
        escape(&test.class),
        escape(&test.name),
        file.unwrap_or_default(),
        test.time.as_secs_f64(),
    );
    let (element, why) = match &test.outcome {
        Outcome::Pass => return text.push_str("/>\n"),
        Outcome::Failure(why) => ("failure", why),
        Outcome::Error(why) => ("error", why),
        Outcome::Skipped(why) => ("skipped", why),
    };
    let message = escape(why.lines().next().unwrap_or_default());
    let _ = write!(text, ">\n      <{element} message=\"{message}\">{}</{element}>", escape(why));
    text.push_str("\n    </testcase>\n");
}

/// Text as it stands between elements and in attributes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // A reader would make spaces and line ends of its own of them.
            '\t' | '\n' | '\r' => {
                let _ = write!(escaped, "&#{};", c as u32);
            }
            '\0'..='\x1F' | '\u{FFFE}' | '\u{FFFF}' => escaped.push('\u{FFFD}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_another_suite_can_follow() {
        let test = |name: &str, outcome| TestCase {
            class: "gemm".to_owned(),
            name: name.to_owned(),
            file: None,
            time: Duration::from_millis(1500),
            outcome,
        };
        let failure = Outcome::Failure("a < b\nand \u{1b}[1m".to_owned());
        let suite = Suite { name: "s".to_owned(), tests: vec![test("<&\">", failure)] };
        let text = document(&[suite]);
        assert_eq!(
            text,
            r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites>
  <testsuite name="s" tests="1" failures="1" errors="0" skipped="0" time="1.500000">
    <testcase classname="gemm" name="&lt;&amp;&quot;&gt;" time="1.500000">
      <failure message="a &lt; b">a &lt; b&#10;and �[1m</failure>
    </testcase>
  </testsuite>
</testsuites>
"#
        );
        let more = Suite { name: "t".to_owned(), tests: vec![test("u", Outcome::Pass)] };
        let both = append(&text, &more).unwrap();
        assert!(both.starts_with(text.strip_suffix(END).unwrap()), "{both}");
        assert!(both.contains(r#"<testcase classname="gemm" name="u" time="1.500000"/>"#));
        assert!(append("not ours", &more).is_none());
    }
}
