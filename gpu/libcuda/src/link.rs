//! Linking: several PTX texts become one, as `cuLinkAddData` and `cuLinkComplete` promise.
//!
//! It works on the syntax trees. Names without linkage that two texts share are renamed;
//! declarations give way to definitions; of weak functions the first is kept. Debug sections, files
//! and line marks are dropped, since files are numbered by each text for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Mutex;

use fathom_ptx::ast::{FuncId, Item, Linkage, Module, Statement};
use fathom_ptx::{Options, parse_with};

/// A link that a client has begun.
#[derive(Default)]
pub(crate) struct Link {
    pub parts: Mutex<Vec<String>>,
    /// That a thread may have, where the client says it.
    pub registers: Option<u32>,
    pub logs: Logs,
}

/// Where a client wants to read what a compilation or a link said.
#[derive(Default)]
pub(crate) struct Logs {
    pub info: Log,
    pub error: Log,
}

/// A buffer of the client's, by addresses: a link keeps it until it is completed.
#[derive(Default)]
pub(crate) struct Log {
    /// 0 where there is none.
    pub buffer: usize,
    pub room: usize,
    /// The option's value that gives the size, where the client reads how much is filled; or 0.
    pub filled: usize,
}

impl Log {
    /// Takes the size from an option's value.
    pub fn sized(&mut self, value: usize, at: *const usize) {
        // An integer in a pointer's place: its upper half is not the client's.
        (self.room, self.filled) = (value as u32 as usize, at as usize);
    }
}

/// Links PTX texts into one.
///
/// # Errors
/// A sentence that names what is defined twice, or the place where a text is not PTX.
pub(crate) fn link(texts: &[String]) -> Result<String, String> {
    let mut modules = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        // What the table does not know is refused by who loads the result.
        let module = parse_with(text.trim_end_matches('\0'), Options { keep_unknown: true });
        modules.push(module.map_err(|e| e.in_file(format!("PTX {}", i + 1)).to_string())?);
    }
    make_distinct(&mut modules);
    let defined = definitions(&modules)?;
    for function in modules.iter_mut().flat_map(|m| &mut m.functions) {
        if function.linkage == Linkage::Extern && defined.contains_key(&function.name) {
            function.linkage = Linkage::Visible;
        }
        if let Some(body) = &mut function.body {
            body.statements.retain(|s| !matches!(s, Statement::Loc(_)));
        }
    }
    Ok(print(&modules, &defined))
}

/// The text with `.maxnreg` at each kernel that does not say itself how many registers it may have.
/// Everything else stays as it is, lines too.
pub(crate) fn limit_registers(ptx: &str, most: u32) -> String {
    let mut limited = String::with_capacity(ptx.len() + 64);
    // The directives of the kernel whose body is looked for.
    let mut head: Option<String> = None;
    let mut rest = ptx;
    while let Some(c) = rest.chars().next() {
        let comment = match rest {
            _ if rest.starts_with("//") => rest.find('\n'),
            _ if rest.starts_with("/*") => rest.find("*/").map(|at| at + 2),
            _ => Some(0),
        };
        let taken = match comment {
            None => rest.len(),
            Some(0) if rest.starts_with(".entry") => {
                head = Some(String::new());
                ".entry".len()
            }
            Some(0) => c.len_utf8(),
            Some(bytes) => bytes,
        };
        if comment == Some(0) {
            let own = |head: &String| head.contains(".maxnreg") || head.contains(".minnctapersm");
            match &mut head {
                Some(said) if c == '{' || c == ';' => {
                    if c == '{' && !own(said) {
                        limited.push_str(&format!(".maxnreg {most} "));
                    }
                    head = None;
                }
                Some(said) => said.push_str(&rest[..taken]),
                None => {}
            }
        }
        limited.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    limited
}

/// Renames names without linkage that another text has too.
fn make_distinct(modules: &mut [Module]) {
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (i, module) in modules.iter_mut().enumerate() {
        let functions = module.functions.iter_mut();
        let functions =
            functions.map(|f| (&mut f.name, f.linkage == Linkage::Internal && !f.entry));
        let variables = module.variables.iter_mut();
        let variables = variables.map(|v| (&mut v.name, v.linkage == Linkage::Internal));
        let mut own = Vec::new();
        for (name, internal) in functions.chain(variables) {
            if internal && seen.contains(name) {
                *name = format!("{name}${}", i + 1);
            }
            own.push(name.clone());
        }
        seen.extend(own);
    }
}

/// Which module gives each function and variable its definition.
fn definitions(modules: &[Module]) -> Result<BTreeMap<String, usize>, String> {
    let mut defined: BTreeMap<String, usize> = BTreeMap::new();
    for (i, module) in modules.iter().enumerate() {
        for item in &module.items {
            let (name, linkage) = match item {
                Item::Variable(v) => {
                    let v = &module.variables[v.index()];
                    (&v.name, v.linkage)
                }
                Item::Define(f) => {
                    let f = &module.functions[f.index()];
                    (&f.name, f.linkage)
                }
                _ => continue,
            };
            if linkage == Linkage::Extern {
                continue;
            }
            let first = *defined.entry(name.clone()).or_insert(i);
            if first != i && !matches!(linkage, Linkage::Weak | Linkage::Common) {
                return Err(format!("{name} is defined in PTX {} and in PTX {}", first + 1, i + 1));
            }
        }
    }
    Ok(defined)
}

/// The linked text: declarations of all functions first, then variables, then bodies.
fn print(modules: &[Module], defined: &BTreeMap<String, usize>) -> String {
    let mut header = Module {
        version: modules.iter().map(|m| m.version).max().unwrap_or_default(),
        address_size: modules.iter().map(|m| m.address_size).max().unwrap_or(64),
        ..Module::default()
    };
    if let Some(newest) = modules.iter().max_by_key(|m| m.target.sm) {
        header.target = newest.target.clone();
    }
    let mut out = header.to_string();
    let mut put = |module: &Module, item: &Item| {
        write!(out, "{}", module.text_of(item)).expect("writing to a String");
    };
    let mut declared = BTreeSet::new();
    for module in modules {
        // Of kernels those that the text itself declares: other kernels name them to launch them.
        let own: BTreeSet<usize> = (module.items.iter())
            .filter_map(|i| if let Item::Declare(f) = i { Some(f.index()) } else { None })
            .collect();
        for (i, function) in module.functions.iter().enumerate() {
            if (!function.entry || own.contains(&i)) && declared.insert(&function.name) {
                put(module, &Item::Declare(FuncId(i as u32)));
            }
        }
    }
    let mut external = BTreeSet::new();
    for (i, module) in modules.iter().enumerate() {
        for item in &module.items {
            let wanted = match item {
                Item::Variable(v) => match &module.variables[v.index()] {
                    v if v.linkage == Linkage::Extern => {
                        !defined.contains_key(&v.name) && external.insert(&v.name)
                    }
                    v => defined.get(&v.name) == Some(&i),
                },
                Item::Alias(_) | Item::Pragma(_) => true,
                Item::Declare(_) | Item::Define(_) | Item::File(_) => false,
            };
            if wanted {
                put(module, item);
            }
        }
    }
    for (i, module) in modules.iter().enumerate() {
        for item in &module.items {
            if let Item::Define(f) = item
                && defined.get(&module.functions[f.index()].name) == Some(&i)
            {
                put(module, item);
            }
        }
    }
    out
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
    fn registers_are_limited_where_a_kernel_does_not_say_it_itself() {
        let text = ".visible .entry a(.param .u32 p) // .entry { no\n{\nret;\n}\n\
                    .visible .func f() {\n/* .entry { */ ret;\n}\n\
                    .entry b() .maxntid 64, 1, 1 .maxnreg 32 {\nret;\n}\n.entry c() {ret;}";
        let limited = limit_registers(text, 40);
        assert!(limited.contains("// .entry { no\n.maxnreg 40 {"), "{limited}");
        assert!(limited.ends_with(".entry c() .maxnreg 40 {ret;}"), "{limited}");
        assert_eq!(limited.matches(".maxnreg 40").count(), 2, "{limited}");
        assert_eq!(limited.replace(".maxnreg 40 ", ""), text);
    }

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
