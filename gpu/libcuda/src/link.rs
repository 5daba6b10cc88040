//! Linking: several PTX texts become one, as `cuLinkAddData` and `cuLinkComplete` promise.
//!
//! A text is cut into its statements at module scope. Names without linkage that two texts share
//! are renamed; declarations give way to definitions; of weak functions the first is kept. Debug
//! sections and line marks are dropped, since files are numbered by each text for itself.

use std::collections::{BTreeMap, BTreeSet};

/// What links a name to other texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Linkage {
    Internal,
    Visible,
    Weak,
    Extern,
}

/// A statement at module scope.
#[derive(Clone, Debug)]
enum Statement {
    /// `.version` and its kin, a line each.
    Header {
        key: String,
        value: String,
    },
    Function {
        name: String,
        linkage: Linkage,
        entry: bool,
        text: String,
    },
    Variable {
        name: String,
        linkage: Linkage,
        text: String,
    },
    Other(String),
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%')
}

/// A text without comments and debug line marks.
fn clean(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    let mut quoted = false;
    while let Some(c) = rest.chars().next() {
        let comment = |open: &str, close: &str| {
            (!quoted && rest.starts_with(open)).then(|| rest[2..].find(close).map(|i| i + 2))
        };
        if let Some(end) = comment("//", "\n") {
            rest = &rest[end.unwrap_or(rest.len())..];
            continue;
        }
        if let Some(end) = comment("/*", "*/") {
            rest = end.map_or("", |i| &rest[i + 2..]);
            continue;
        }
        quoted ^= c == '"';
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    // `.local` begins alike.
    let marks = |line: &&str| line.split_whitespace().next() != Some(".loc");
    out.lines().filter(marks).collect::<Vec<_>>().join("\n")
}

/// Cuts a text into its statements.
fn statements(text: &str) -> Vec<Statement> {
    let text = clean(text);
    let mut out = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let line_end = rest.find('\n').unwrap_or(rest.len());
        let first = rest.split_whitespace().next().unwrap_or("");
        if matches!(first, ".version" | ".target" | ".address_size" | ".file") {
            let value = rest[first.len()..line_end].trim().to_owned();
            out.push(Statement::Header { key: first.to_owned(), value });
            rest = rest[line_end..].trim_start();
            continue;
        }
        let end = statement_end(rest);
        out.push(classify(rest[..end].trim()));
        rest = rest[end..].trim_start();
    }
    out
}

/// Where the statement that `text` begins with ends.
fn statement_end(text: &str) -> usize {
    let (mut depth, mut quoted) = (0i32, false);
    let mut body = false;
    for (i, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            _ if quoted => {}
            '{' | '(' | '[' => {
                if c == '{' && depth == 0 {
                    // Initialisers follow `=`; all other braces are bodies.
                    body = !text[..i].contains('=');
                }
                depth += 1;
            }
            '}' | ')' | ']' => {
                depth -= 1;
                if c == '}' && depth <= 0 && body {
                    return i + 1;
                }
            }
            ';' if depth <= 0 => return i + 1,
            _ => {}
        }
    }
    text.len()
}

fn classify(text: &str) -> Statement {
    let head = text.split(['{', '=']).next().unwrap_or(text);
    let words: Vec<&str> = head.split_whitespace().collect();
    let linkage = if words.contains(&".extern") {
        Linkage::Extern
    } else if words.contains(&".weak") || words.contains(&".common") {
        Linkage::Weak
    } else if words.contains(&".visible") {
        Linkage::Visible
    } else {
        Linkage::Internal
    };
    for (directive, entry) in [(".entry", true), (".func", false)] {
        if let Some(at) = head.find(directive) {
            let mut after = head[at + directive.len()..].trim_start();
            if after.starts_with('(') {
                after = after.split_once(')').map_or("", |(_, rest)| rest).trim_start();
            }
            let name = after.chars().take_while(|&c| is_word(c)).collect();
            return Statement::Function { name, linkage, entry, text: text.to_owned() };
        }
    }
    let spaces = [".global", ".const", ".shared", ".tex"];
    if words.iter().any(|w| spaces.contains(w)) {
        let named = head.split(['[', ';']).next().unwrap_or(head);
        let name = named.split_whitespace().last().unwrap_or("").to_owned();
        return Statement::Variable { name, linkage, text: text.to_owned() };
    }
    Statement::Other(text.to_owned())
}

/// Replaces whole words.
fn rename(text: &str, names: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut word = String::new();
    let mut quoted = false;
    for c in text.chars().chain(['\n']) {
        if is_word(c) && !quoted {
            word.push(c);
            continue;
        }
        // Behind a dot stands a part of a directive or mnemonic (`ld.local`), never a name.
        let name = names.get(&word).filter(|_| !out.ends_with('.'));
        out.push_str(name.unwrap_or(&word));
        word.clear();
        quoted ^= c == '"';
        out.push(c);
    }
    out.pop();
    out
}

/// Links PTX texts into one.
///
/// # Errors
/// A sentence that names what is defined twice.
pub(crate) fn link(texts: &[String]) -> Result<String, String> {
    let mut parts: Vec<Vec<Statement>> = texts.iter().map(|t| statements(t)).collect();
    make_distinct(&mut parts);
    let all = || parts.iter().flatten();
    let newest = |key: &str| {
        let number = |v: &str| {
            let digits: String = v.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect();
            digits.parse::<f64>().unwrap_or(0.0)
        };
        all()
            .filter_map(|s| match s {
                Statement::Header { key: k, value } if k == key => Some(value.clone()),
                _ => None,
            })
            .max_by(|a, b| number(a).total_cmp(&number(b)))
    };
    let mut out = String::new();
    for key in [".version", ".target", ".address_size"] {
        if let Some(value) = newest(key) {
            out.push_str(&format!("{key} {value}\n"));
        }
    }
    let has_body = |text: &str| text.contains('{');
    let mut defined: BTreeMap<&str, (usize, Linkage)> = BTreeMap::new();
    let mut dropped: BTreeSet<(usize, &str)> = BTreeSet::new();
    for (i, part) in parts.iter().enumerate() {
        for s in part {
            let (name, linkage) = match s {
                Statement::Function { name, linkage, text, .. } if has_body(text) => {
                    (name, *linkage)
                }
                Statement::Variable { name, linkage, .. } if *linkage != Linkage::Extern => {
                    (name, *linkage)
                }
                _ => continue,
            };
            match defined.get(name.as_str()) {
                None => {
                    defined.insert(name, (i, linkage));
                }
                Some(_) if linkage == Linkage::Weak => {
                    dropped.insert((i, name));
                }
                Some(&(first, _)) => {
                    return Err(format!(
                        "{name} is defined in PTX {} and in PTX {}",
                        first + 1,
                        i + 1
                    ));
                }
            }
        }
    }
    // Declarations of all functions first, then variables, then bodies.
    let mut known = BTreeSet::new();
    for s in all() {
        if let Statement::Function { name, text, entry: false, .. } = s
            && known.insert(name)
        {
            let head = text.split('{').next().unwrap_or(text).trim_end_matches(';').trim();
            let head = if defined.contains_key(name.as_str()) {
                head.replace(".extern", ".visible")
            } else {
                head.to_owned()
            };
            out.push_str(&format!("{head};\n"));
        }
    }
    let mut known = BTreeSet::new();
    for (i, part) in parts.iter().enumerate() {
        for s in part {
            match s {
                Statement::Variable { name, linkage, text } => {
                    let elsewhere = *linkage == Linkage::Extern && defined.contains_key(&**name);
                    if !elsewhere && !dropped.contains(&(i, &**name)) && known.insert(name) {
                        out.push_str(text);
                        out.push('\n');
                    }
                }
                Statement::Other(text) if !text.starts_with(".section") => {
                    out.push_str(text);
                    out.push('\n');
                }
                _ => {}
            }
        }
    }
    for (i, part) in parts.iter().enumerate() {
        for s in part {
            if let Statement::Function { name, text, .. } = s
                && has_body(text)
                && !dropped.contains(&(i, name.as_str()))
            {
                out.push_str(text);
                out.push('\n');
            }
        }
    }
    Ok(out)
}

/// Renames names without linkage that another text has too.
fn make_distinct(parts: &mut [Vec<Statement>]) {
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (i, part) in parts.iter_mut().enumerate() {
        let mut names = BTreeMap::new();
        let mut own = BTreeSet::new();
        for s in part.iter() {
            let (name, linkage) = match s {
                Statement::Function { name, linkage, entry: false, .. }
                | Statement::Variable { name, linkage, .. } => (name, *linkage),
                Statement::Function { name, .. } => {
                    own.insert(name.clone());
                    continue;
                }
                _ => continue,
            };
            if linkage == Linkage::Internal && seen.contains(name) {
                names.insert(name.clone(), format!("{name}${}", i + 1));
            }
            own.insert(name.clone());
        }
        for s in part.iter_mut() {
            match s {
                Statement::Function { name, text, .. } | Statement::Variable { name, text, .. } => {
                    *text = rename(text, &names);
                    *name = names.get(name).unwrap_or(name).clone();
                }
                Statement::Other(text) => *text = rename(text, &names),
                Statement::Header { .. } => {}
            }
        }
        seen.extend(own.into_iter().map(|n| names.get(&n).unwrap_or(&n).clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "
.version 8.0
.target sm_80
.address_size 64
.extern .func (.param .b32 r) scale (.param .b32 x);
.extern .global .align 4 .u32 factor;
.global .align 4 .u32 local = 3; // one of each text
.func (.param .b32 r) help (.param .b32 x)
{
    .reg .u32 %a, %b;
    ld.param.u32 %a, [x];
    ld.global.u32 %b, [local];
    add.u32 %a, %a, %b;
    st.param.b32 [r], %a;
    ret;
}
.visible .entry k(.param .u64 p)
{
    .local .align 4 .b8 depot[4];
    .reg .u64 %p; .reg .u32 %v, %f;
    .loc 1 2 3
    mov.u32 %f, 0;
    st.local.u32 [depot], %f;
    ld.param.u64 %p, [p];
    ld.global.u32 %v, [%p];
    { .param .b32 a; .param .b32 b; st.param.b32 [a], %v; call (b), scale, (a); ld.param.b32 %v, [b]; }
    { .param .b32 a; .param .b32 b; st.param.b32 [a], %v; call (b), help, (a); ld.param.b32 %v, [b]; }
    ld.global.u32 %f, [factor];
    add.u32 %v, %v, %f;
    st.global.u32 [%p], %v;
    ret;
}
";

    const LIBRARY: &str = "
.version 8.5
.target sm_90
.address_size 64
.visible .global .align 4 .u32 factor = 1000;
.global .align 4 .u32 local = 5;
.func (.param .b32 r) help (.param .b32 x)
{
    .reg .u32 %a, %b;
    ld.param.u32 %a, [x];
    ld.global.u32 %b, [local];
    mul.lo.u32 %a, %a, %b;
    st.param.b32 [r], %a;
    ret;
}
.visible .func (.param .b32 r) scale (.param .b32 x)
{
    .reg .u32 %a;
    ld.param.u32 %a, [x];
    { .param .b32 a; .param .b32 b; st.param.b32 [a], %a; call (b), help, (a); ld.param.b32 %a, [b]; }
    st.param.b32 [r], %a;
    ret;
}
";

    #[test]
    fn texts_are_linked_whatever_their_order() {
        use fathom_emulator::{Device, LaunchConfig, Module, Params, Preset};
        for order in [[KERNEL, LIBRARY], [LIBRARY, KERNEL]] {
            let text = link(&order.map(str::to_owned)).unwrap();
            let device = Device::new(Preset::named("h800").unwrap());
            let module = Module::load(&device, &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
            let at = device.upload(&[7u32]).unwrap();
            let params = Params::new().with(at).into_bytes();
            let config = LaunchConfig::new([1, 1, 1], [1, 1, 1], params);
            device.launch(&module.function("k").unwrap(), &config).unwrap();
            // 7 * 5, + 3, + 1000: each text's own `help` and `local`.
            assert_eq!(device.download::<u32>(at, 1).unwrap(), [1038]);
            assert!(text.starts_with(".version 8.5\n.target sm_90\n"));
        }
    }

    #[test]
    fn what_is_defined_twice_is_named() {
        let twice = [LIBRARY.to_owned(), LIBRARY.to_owned()];
        assert_eq!(link(&twice).unwrap_err(), "factor is defined in PTX 1 and in PTX 2");
        let weak = LIBRARY.replace(".visible .global", ".weak .global");
        let weak = weak.replace(".visible .func", ".weak .func");
        assert!(link(&[weak.clone(), weak]).is_ok());
    }
}
