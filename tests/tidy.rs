//! What people forget: file headers, line width, dead files, the direction of dependencies, large
//! blobs, licences of dependencies, leftovers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

#[path = "tidy/imports.rs"]
mod imports;

use imports::Crate;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of the working tree: those that git tracks or would, or all where there is no git.
fn files() -> Vec<PathBuf> {
    let git = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    if let Ok(output) = git
        && output.status.success()
        && !output.stdout.is_empty()
    {
        let names = output.stdout.split(|b| *b == 0).filter(|n| !n.is_empty());
        let paths = names.map(|n| root().join(String::from_utf8_lossy(n).as_ref()));
        return paths.filter(|p| p.is_file()).collect();
    }
    let mut found = Vec::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != ".git" {
                folders.push(path);
            } else if path.is_file() {
                found.push(path);
            }
        }
    }
    found
}

fn sources() -> Vec<(PathBuf, String)> {
    let rust = files().into_iter().filter(|p| p.extension().is_some_and(|e| e == "rs"));
    rust.map(|p| (p.strip_prefix(root()).unwrap().to_owned(), std::fs::read_to_string(&p).unwrap()))
        .collect()
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let bare = |(p, text): (PathBuf, String)| {
        let first = text.lines().find(|l| !l.trim().is_empty()).unwrap_or_default().to_owned();
        (!first.starts_with("//!") && !first.starts_with("#!")).then(|| p.display().to_string())
    };
    assert_none(
        "files without a `//!` header",
        &sources().into_iter().filter_map(bare).collect::<Vec<_>>(),
    );
}

#[test]
fn comments_are_at_most_100_wide() {
    let mut wide = Vec::new();
    for (path, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            // Code is rustfmt's; a link cannot be broken.
            let breakable = line.trim_start().starts_with("//") && !line.contains("://");
            if line.chars().count() > 100 && breakable {
                wide.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert_none("comments wider than 100", &wide);
}

/// A doc comment of one or two words says what the name says. That of a name in code says which;
/// those of the command line are its help.
#[test]
fn doc_comments_say_something() {
    let mut empty = Vec::new();
    for (path, text) in sources().iter().filter(|(p, _)| !p.starts_with("src")) {
        let doc = |line: &str| line.trim_start().strip_prefix("///").map(str::to_owned);
        let lines: Vec<Option<String>> = text.lines().map(doc).collect();
        for (number, block) in lines.chunk_by(|a, b| a.is_some() == b.is_some()).scan(0, |at, b| {
            *at += b.len();
            Some((*at, b))
        }) {
            let words: Vec<&str> =
                block.iter().flatten().flat_map(|line| line.split_whitespace()).collect();
            if (1..=2).contains(&words.len()) && !words.concat().contains('`') {
                empty.push(format!("{}:{number}: {}", path.display(), words.join(" ")));
            }
        }
    }
    assert_none("doc comments of at most two words", &empty);
}

#[test]
fn nothing_is_left_over() {
    // Spelled in two halves, so that this file does not find itself.
    let words = ["todo", "unimplemented"].map(|w| format!("{w}!("));
    let marks = [("FIX", "ME"), ("TO", "DO:")].map(|(a, b)| format!("{a}{b}"));
    let ignored = format!("#[{}", "ignore");
    let mut found = Vec::new();
    for (path, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            let left =
                words.iter().chain(&marks).chain([&ignored]).any(|w| line.contains(w.as_str()));
            if left {
                found.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("leftovers", &found);
}

/// A source file that no module declares is dead.
#[test]
fn every_module_file_is_declared() {
    let sources: BTreeMap<PathBuf, String> = sources().into_iter().collect();
    let mut dead = Vec::new();
    for path in sources.keys() {
        let text = path.to_string_lossy();
        let Some((_, below)) = text.rsplit_once("src/") else { continue };
        let stem = path.file_stem().unwrap().to_string_lossy();
        if below == "lib.rs" || below == "main.rs" || below.starts_with("bin/") {
            continue;
        }
        let folder = path.parent().unwrap();
        let (name, parents) = if stem == "mod" {
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            (name, folder.parent().unwrap().to_owned())
        } else {
            (stem.into_owned(), folder.to_owned())
        };
        let mut candidates =
            vec![parents.join("mod.rs"), parents.join("lib.rs"), parents.join("main.rs")];
        candidates.push(parents.with_extension("rs"));
        let declared = candidates.iter().filter_map(|c| sources.get(c)).any(|text| {
            text.lines().any(|l| {
                let words = l.trim().trim_end_matches(';');
                words.ends_with(&format!("mod {name}")) && l.trim().ends_with(';')
                    || words.contains(&format!("mod {name} {{"))
            })
        });
        if !declared {
            dead.push(path.display().to_string());
        }
    }
    assert_none("source files that no module declares", &dead);
}

/// The code of a source file without its comments and its unit tests.
fn code(text: &str) -> String {
    let code = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = code.lines().filter(|l| !l.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Arithmetic that only tests call is not the arithmetic that runs: what is tested there proves
/// nothing. Functions that a CUDA header names as its twin have their caller on the GPU.
#[test]
fn every_public_function_of_numerics_is_called_by_more_than_tests() {
    let of_tests = |p: &Path| p.components().any(|c| c.as_os_str() == "tests");
    let all: Vec<_> = sources().into_iter().filter(|(p, _)| !of_tests(p)).collect();
    let mut words: BTreeMap<String, usize> = BTreeMap::new();
    let mut count = |text: &str| {
        for word in text.split(|c: char| !c.is_alphanumeric() && c != '_') {
            *words.entry(word.to_owned()).or_default() += 1;
        }
    };
    all.iter().for_each(|(_, text)| count(&code(text)));
    let cuda = files().into_iter().filter(|p| p.extension().is_some_and(|e| e == "cuh"));
    cuda.for_each(|p| count(&std::fs::read_to_string(p).unwrap()));
    let mut unused = Vec::new();
    for (path, text) in all.iter().filter(|(p, _)| p.starts_with("reference/numerics/src")) {
        let code = code(text);
        let definitions = code.lines().filter_map(|l| {
            let l = l.trim_start().strip_prefix("pub ")?;
            let l = l.strip_prefix("const ").unwrap_or(l);
            l.strip_prefix("fn ")?.split(['(', '<']).next()
        });
        let alone = definitions.filter(|name| words.get(*name) == Some(&1));
        unused.extend(alone.map(|name| format!("{}: {name}", path.display())));
    }
    assert_none("public functions of numerics that only tests call", &unused);
}

/// A crate without unsafe code says so, and the compiler holds it to that.
#[test]
fn crates_that_need_no_unsafe_forbid_it() {
    let sources = sources();
    let mut open = Vec::new();
    for (root, text) in sources.iter().filter(|(p, _)| {
        let name = p.file_name().unwrap();
        let folder = p.parent().unwrap();
        let of_a_crate = folder.join("Cargo.toml").is_file() || folder.ends_with("src");
        of_a_crate && (name == "lib.rs" || name == "main.rs")
    }) {
        let own = sources.iter().filter(|(p, _)| p.starts_with(root.parent().unwrap()));
        let mut words = own.flat_map(|(_, text)| {
            let code = code(text);
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            words.map(str::to_owned).collect::<Vec<_>>()
        });
        if !words.any(|word| word == "unsafe") && !text.contains("#![forbid(unsafe_code)]") {
            open.push(root.display().to_string());
        }
    }
    assert_none("crates without unsafe code that do not forbid it", &open);
}

/// Every page that a page links to is there, and the book's index names every page.
#[test]
fn links_between_pages_hold() {
    let mut broken = Vec::new();
    let pages = files().into_iter().filter(|p| p.extension().is_some_and(|e| e == "md"));
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            let local = !target.is_empty() && !target.contains("://") && !target.contains(' ');
            if local && !page.parent().unwrap().join(target).exists() {
                broken.push(format!("{}: {link}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    let [index, summary] = ["docs/README.md", "docs/SUMMARY.md"]
        .map(|page| std::fs::read_to_string(root().join(page)).unwrap());
    for entry in std::fs::read_dir(root().join("docs")).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") && !["README.md", "SUMMARY.md"].contains(&&*name) {
            for (page, text) in [("README", &index), ("SUMMARY", &summary)] {
                if !text.contains(&name) {
                    broken.push(format!("docs/{page}.md does not name {name}"));
                }
            }
        }
    }
    assert_none("broken links", &broken);
}

#[test]
fn no_large_blob_is_committed() {
    let large: Vec<_> = files()
        .iter()
        .filter_map(|p| {
            let bytes = std::fs::metadata(p).unwrap().len();
            (bytes > 512 * 1024).then(|| format!("{} ({bytes} bytes)", p.display()))
        })
        .collect();
    assert_none("files above 512 KiB", &large);
}

/// The packages of a build for this machine. Those of other systems are left out: a build here
/// never downloads them, and on a fresh machine they cannot be read offline.
fn metadata() -> Value {
    let version = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let host =
        version.lines().find_map(|l| l.strip_prefix("host: ")).expect("rustc names its host");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", host])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Which of our crates each may use: dependencies point one way.
#[test]
fn dependencies_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("fathom-numerics", &[][..]),
        ("fathom-trace", &[]),
        ("fathom-config", &["fathom-trace"]),
        (
            "fathom-reference",
            &["fathom-config", "fathom-numerics", "fathom-schedule", "fathom-trace"],
        ),
        ("fathom-gpu", &["fathom-config", "fathom-numerics", "fathom-trace", "fathom-reference"]),
        ("fathom-ptx", &[]),
        ("fathom-emulator", &["fathom-config", "fathom-numerics", "fathom-ptx", "fathom-trace"]),
        ("fathom-libcuda", &["fathom-emulator", "fathom-numerics", "fathom-ptx", "fathom-trace"]),
        ("fathom-schedule", &[]),
        ("fathom-simulator", &["fathom-config", "fathom-schedule", "fathom-trace"]),
        (
            "fathom-conformance",
            &[
                "fathom-config",
                "fathom-numerics",
                "fathom-trace",
                "fathom-reference",
                "fathom-emulator",
                "fathom-gpu",
                "fathom-simulator",
            ],
        ),
    ]);
    let metadata = metadata();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let Some(may) = allowed.get(name) else { continue };
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            // A test may look at more than the code it tests.
            let of_the_code = dependency["kind"].is_null();
            if of_the_code && on.starts_with("fathom-") && !may.contains(&on) {
                wrong.push(format!("{name} -> {on}"));
            }
        }
    }
    assert_none("dependencies that point the wrong way", &wrong);
}

/// Folders `src` of our crates.
fn crates() -> BTreeSet<PathBuf> {
    let sources = sources();
    let roots = sources.iter().filter(|(p, _)| p.ends_with("src/lib.rs"));
    roots.map(|(p, _)| p.parent().expect("src").to_owned()).collect()
}

/// What the two tests below see of a crate: imports of all shapes, followed through `pub use`.
#[test]
fn imports_are_seen() {
    let file = |path: &str, text: &str| (PathBuf::from(path), text.to_owned());
    let sources = BTreeMap::from([
        file("src/lib.rs", "mod a;\nmod b;\npub use b::{deep::{self, Deep}, Other};"),
        file("src/a.rs", "use crate::{b::{Other as O, deep}, Deep};\nfn f() { deep::g() }"),
        file("src/b/mod.rs", "pub mod deep;\npub struct Other; // crate::a::f"),
        file("src/b/deep.rs", "pub struct Deep;\npub fn g() { super::super::a::f(\"crate::b\") }"),
    ]);
    let files = Crate::read(Path::new("src"), &sources);
    let arrows = files.arrows();
    let to = |from: &str| -> Vec<_> { arrows[Path::new(from)].iter().copied().collect() };
    assert_eq!(to("src/lib.rs"), [Path::new("src/b/deep.rs"), Path::new("src/b/mod.rs")]);
    assert_eq!(to("src/a.rs"), [Path::new("src/b/deep.rs"), Path::new("src/b/mod.rs")]);
    assert_eq!(to("src/b/deep.rs"), [Path::new("src/a.rs")]);
    assert!(to("src/b/mod.rs").is_empty());
    assert_eq!(files.circles(), [[Path::new("src/a.rs"), Path::new("src/b/deep.rs")]]);
}

/// Most files that may import each other in a circle.
const CIRCLE: usize = 4;

/// A knot of files can only be read, and changed, as one.
#[test]
fn circles_of_imports_are_small() {
    let sources = sources().into_iter().collect();
    let mut large = Vec::new();
    for folder in crates() {
        let files = Crate::read(&folder, &sources);
        let arrows = files.arrows();
        for circle in files.circles().iter().filter(|c| c.len() > CIRCLE) {
            large.push(format!(
                "{} files of {} import each other:",
                circle.len(),
                folder.display()
            ));
            for from in circle {
                let to = arrows[from].iter().filter(|to| circle.contains(to));
                let to: Vec<_> = to.map(|to| to.display().to_string()).collect();
                large.push(format!("  {} imports {}", from.display(), to.join(", ")));
            }
        }
    }
    assert_none("circles of imports: move what both sides need below them", &large);
}

/// A layer: its name, and its files and folders.
type Layer = (&'static str, &'static [&'static str]);

/// The layers of crates, the lowest first: a file imports nothing of a higher one. Of several
/// entries that fit a file the longest counts.
const LAYERS: [(&str, &[Layer]); 2] = [
    (
        "gpu/emulator/src",
        &[
            (
                "facts",
                &[
                    "config.rs",
                    "error.rs",
                    "heap.rs",
                    "memory/",
                    "preset.rs",
                    "program.rs",
                    "tensormap.rs",
                    "texture/",
                ],
            ),
            ("machine", &["machine/"]),
            ("builder", &["lower/"]),
            ("instructions", &["exec/"]),
            ("driver", &["lower/mod.rs"]),
            (
                "surface",
                &[
                    "device.rs",
                    "engine.rs",
                    "launch.rs",
                    "lib.rs",
                    "memory_host.rs",
                    "module.rs",
                    "report.rs",
                    "run.rs",
                ],
            ),
        ],
    ),
    (
        "gpu/libcuda/src",
        &[
            (
                "words",
                &[
                    "abi.rs",
                    "choices.rs",
                    "driver_check.rs",
                    "image.rs",
                    "link.rs",
                    "machine.rs",
                    "results.rs",
                    "say.rs",
                    "summary.rs",
                ],
            ),
            ("objects", &["objects/", "queue.rs"]),
            ("driver", &["driver/"]),
            ("surface", &["api/", "lib.rs", "nvml.rs", "prepare.rs", "standins/"]),
        ],
    ),
];

#[test]
fn layers_of_a_crate_point_one_way() {
    let sources = sources().into_iter().collect();
    let mut wrong = Vec::new();
    for (folder, layers) in LAYERS {
        let files = Crate::read(Path::new(folder), &sources);
        let layer = |file: &Path| {
            let below = file.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
            let entries =
                layers.iter().enumerate().flat_map(|(i, (_, e))| e.iter().map(move |e| (i, e)));
            let fitting = entries.filter(|(_, e)| below.starts_with(**e));
            fitting.max_by_key(|(_, e)| e.len()).map(|(i, _)| i)
        };
        for (from, list) in files.arrows() {
            let Some(own) = layer(from) else {
                wrong.push(format!("{} has no layer: add it to LAYERS", from.display()));
                continue;
            };
            for to in list {
                if let Some(other) = layer(to).filter(|other| *other > own) {
                    let (own, other) = (layers[own].0, layers[other].0);
                    let (from, to) = (from.display(), to.display());
                    wrong.push(format!(
                        "{from} ({own}) imports {to} ({other}): move what it needs down to {own} \
                         or below, or itself up to {other}"
                    ));
                }
            }
        }
    }
    assert_none("imports of a higher layer", &wrong);
}

/// Licences under which a dependency may be used beside MIT OR Apache-2.0.
const LICENCES: [&str; 14] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
    "CC0-1.0",
    "Unicode-3.0",
    "BSL-1.0",
    "MIT-0",
    "MPL-2.0",
];

#[test]
fn every_dependency_has_a_licence_we_can_use() {
    let mut refused = BTreeSet::new();
    for package in metadata()["packages"].as_array().unwrap() {
        let licence = package["license"].as_str().unwrap_or("none");
        // An expression is a choice (OR, and the old '/') of conjunctions.
        let choices = licence.replace('/', " OR ").replace(['(', ')'], "");
        let usable = choices
            .split(" OR ")
            .any(|choice| choice.split(" AND ").all(|one| LICENCES.contains(&one.trim())));
        if !usable {
            refused.insert(format!("{}: {licence}", package["name"].as_str().unwrap()));
        }
    }
    assert_none("licences to look at", &refused.into_iter().collect::<Vec<_>>());
}
