//! Which files of a crate import which, read from the paths in their text.
//!
//! An arrow leads from a file to the one that defines what a path names. A name that a module only
//! passes on (`pub use`) is followed to its definition, so a `mod.rs` that declares and re-exports
//! has no arrows of its own. Unit tests do not count. Methods are not seen: where an `impl` block
//! stands is for the reader of the layers to judge.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A module's place in its crate: `["machine", "cx"]`; the root's is empty.
type Module = Vec<String>;

/// What the text of one module says.
#[derive(Default)]
struct Text {
    file: PathBuf,
    /// Names that it brings into scope, with the path that each stands for.
    names: BTreeMap<String, Module>,
    /// Modules of which it brings all names into scope.
    globs: Vec<Module>,
    /// Items that it defines.
    items: BTreeSet<String>,
    /// Other paths in its code.
    paths: Vec<Module>,
}

/// Names that stand for names that stand for names are followed so far.
const DEEPEST: u32 = 8;

/// The modules of one crate.
pub struct Crate(BTreeMap<Module, Text>);

impl Crate {
    /// Reads the files below `folder`, a crate's `src`; those of binaries are crates of their own.
    pub fn read(folder: &Path, sources: &BTreeMap<PathBuf, String>) -> Crate {
        let mut modules = BTreeMap::new();
        for (path, text) in sources {
            let Ok(below) = path.strip_prefix(folder) else { continue };
            let mut module: Module =
                below.with_extension("").iter().map(|p| p.to_string_lossy().into()).collect();
            match module.last().map(String::as_str) {
                Some("mod" | "lib") => drop(module.pop()),
                Some("main") if below.parent() == Some(Path::new("")) => continue,
                _ if module[0] == "bin" => continue,
                _ => {}
            }
            modules.insert(module, parse(path, &super::code(text)));
        }
        Crate(modules)
    }

    /// Arrows between files.
    pub fn arrows(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut arrows: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
        for (module, text) in &self.0 {
            let to = arrows.entry(&text.file).or_default();
            let imported = text.names.values().chain(&text.paths);
            to.extend(imported.filter_map(|path| self.file_of(module, path)));
            let globs = text.globs.iter().filter_map(|path| self.module_of(module, path));
            let globs = globs.filter(|m| !self.0[m].items.is_empty());
            to.extend(globs.map(|m| &*self.0[&m].file));
            to.remove(&*text.file);
        }
        arrows
    }

    /// Sets of more than one file each of which leads to all others, the largest first.
    ///
    /// Arrows from a module to its own children do not count: that a `mod.rs` calls the files of
    /// its folder, and they use its types, is how Rust's modules are built.
    pub fn circles(&self) -> Vec<Vec<&Path>> {
        let mut arrows = self.arrows();
        for module in self.0.keys().filter(|m| !m.is_empty()) {
            let parent = self.0.get(&module[..module.len() - 1]).map(|p| &*p.file);
            if let Some(to) = parent.and_then(|parent| arrows.get_mut(parent)) {
                to.remove(&*self.0[module].file);
            }
        }
        let reached: BTreeMap<&Path, BTreeSet<&Path>> = arrows
            .keys()
            .map(|&from| {
                let (mut seen, mut queue) = (BTreeSet::new(), vec![from]);
                while let Some(file) = queue.pop() {
                    queue.extend(arrows[file].iter().filter(|to| seen.insert(**to)));
                }
                (from, seen)
            })
            .collect();
        let circle_of = |file: &Path| -> Vec<&Path> {
            reached[file].iter().copied().filter(|other| reached[other].contains(file)).collect()
        };
        let mut circles: Vec<_> = arrows.keys().map(|file| circle_of(file)).collect();
        circles.retain(|circle| circle.len() > 1);
        circles.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        circles.dedup();
        circles
    }

    /// The module that a path in `from` names, if it names one.
    fn module_of(&self, from: &Module, path: &[String]) -> Option<Module> {
        let (module, rest) = self.resolve(from, path, 0)?;
        rest.is_empty().then_some(module)
    }

    /// The file that defines what a path in `from` names; none for a module and for other crates.
    fn file_of(&self, from: &Module, path: &[String]) -> Option<&Path> {
        let (module, rest) = self.resolve(from, path, 0)?;
        (!rest.is_empty()).then(|| &*self.0[&module].file)
    }

    /// The deepest module of a path, and what of the path remains inside it.
    fn resolve(&self, from: &Module, path: &[String], depth: u32) -> Option<(Module, Module)> {
        let (head, mut rest) = path.split_first()?;
        let mut at = from.clone();
        match head.as_str() {
            "crate" => at.clear(),
            "self" => {}
            "super" => drop(at.pop()?),
            name => match self.inside(from, name) {
                Some(child) => at = child,
                None => {
                    // A name that an import of this module stands for.
                    let names = &self.0.get(from)?.names;
                    let path = names.get(name).filter(|p| depth < DEEPEST && p[0] != name)?;
                    let path: Module = path.iter().chain(rest).cloned().collect();
                    return self.resolve(from, &path, depth + 1);
                }
            },
        }
        while let Some((name, further)) = rest.split_first() {
            if name == "super" {
                at.pop()?;
            } else if let Some(child) = self.inside(&at, name) {
                at = child;
            } else {
                break;
            }
            rest = further;
        }
        let text = self.0.get(&at)?;
        let passed_on = rest.first().filter(|name| depth < DEEPEST && !text.items.contains(*name));
        if let Some(name) = passed_on {
            let glob = text.globs.iter().filter_map(|g| self.module_of(&at, g));
            let by_glob = glob.into_iter().find(|m| self.0[m].items.contains(name));
            if let Some(module) = by_glob {
                return Some((module, rest.to_vec()));
            }
            if let Some(path) = text.names.get(name) {
                let path: Module = path.iter().chain(&rest[1..]).cloned().collect();
                return self.resolve(&at, &path, depth + 1);
            }
        }
        Some((at, rest.to_vec()))
    }

    fn inside(&self, module: &Module, name: &str) -> Option<Module> {
        let child: Module = module.iter().cloned().chain([name.to_owned()]).collect();
        self.0.contains_key(&child).then_some(child)
    }
}

/// Reads the imports, items and paths of a file.
fn parse(file: &Path, code: &str) -> Text {
    let words = words(code);
    let mut text = Text { file: file.to_owned(), ..Text::default() };
    let is_name = |word: &str| word.starts_with(|c: char| c.is_alphabetic() || c == '_');
    let mut at = 0;
    while at < words.len() {
        let after = |n: usize| words.get(at + n).map_or("", String::as_str);
        match after(0) {
            "use" => {
                at += 1;
                import(&words, &mut at, &mut Vec::new(), &mut text);
            }
            "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union" => {
                text.items.insert(after(1).to_owned());
                at += 1;
            }
            "macro_rules" => {
                text.items.insert(after(2).to_owned());
                at += 2;
            }
            name if is_name(name) && after(1) == "::" => {
                let mut path = vec![name.to_owned()];
                while words.get(at + 1).is_some_and(|w| w == "::")
                    && words.get(at + 2).is_some_and(|w| is_name(w))
                {
                    path.push(words[at + 2].clone());
                    at += 2;
                }
                text.paths.push(path);
                at += 1;
            }
            _ => at += 1,
        }
    }
    text
}

/// Reads one tree of an import, up to the `;`, `,` or `}` behind it.
fn import(words: &[String], at: &mut usize, prefix: &mut Module, text: &mut Text) {
    let length = prefix.len();
    while let Some(word) = words.get(*at) {
        *at += 1;
        match word.as_str() {
            "::" => {}
            "{" => {
                while words.get(*at).is_some_and(|w| w != "}") {
                    import(words, at, prefix, text);
                    *at += usize::from(words.get(*at).is_some_and(|w| w == ","));
                }
                *at += 1;
                break;
            }
            "*" => {
                text.globs.push(prefix.clone());
                break;
            }
            "self" if !prefix.is_empty() => continue,
            name => {
                prefix.push(name.to_owned());
                let next = words.get(*at).map_or("", String::as_str);
                if next == "::" {
                    continue;
                }
                let mut name = name.to_owned();
                if next == "as" {
                    name = words[*at + 1].clone();
                    *at += 2;
                }
                text.names.insert(name, prefix.clone());
                break;
            }
        }
        if words.get(*at).is_some_and(|w| [";", ",", "}"].contains(&w.as_str())) {
            break;
        }
    }
    // `{self, …}` names the module before it.
    if words.get(*at - 1).is_some_and(|w| w == "self")
        && let Some(name) = prefix.last()
    {
        text.names.insert(name.clone(), prefix.clone());
    }
    prefix.truncate(length);
}

/// Names and punctuation of a text; comments and literals are left out.
fn words(code: &str) -> Vec<String> {
    let chars: Vec<char> = code.chars().collect();
    let (mut words, mut at) = (Vec::new(), 0);
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    while at < chars.len() {
        let rest = &chars[at..];
        at += match rest {
            ['/', '/', ..] => rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['r', '"', ..] => 2 + end_of(&rest[2..], &['"']),
            ['r', '#', '"', ..] => 3 + end_of(&rest[3..], &['"', '#']),
            ['"', ..] => {
                let mut end = 1;
                while end < rest.len() && rest[end] != '"' {
                    end += if rest[end] == '\\' { 2 } else { 1 };
                }
                end + 1
            }
            ['\'', '\\', _, ..] => 3 + end_of(&rest[3..], &['\'']),
            ['\'', _, '\'', ..] => 3,
            [':', ':', ..] => {
                words.push("::".to_owned());
                2
            }
            [c, ..] if is_part(*c) => {
                let length = rest.iter().position(|&c| !is_part(c)).unwrap_or(rest.len());
                words.push(rest[..length].iter().collect());
                length
            }
            [c, ..] => {
                if !c.is_whitespace() {
                    words.push(c.to_string());
                }
                1
            }
            [] => unreachable!("at is below the length"),
        };
    }
    words
}

/// Length up to and with the next `mark`.
fn end_of(text: &[char], mark: &[char]) -> usize {
    text.windows(mark.len()).position(|w| w == mark).map_or(text.len(), |at| at + mark.len())
}
