//! Every instruction of the table has a case of its own in `instructions/*.ptx`: a kernel body
//! with inputs and the outputs that the PTX ISA demands. `instructions/README.md` has the format.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use fathom_emulator::{
    Checks, Device, LaunchConfig, MapElement, Mode, Module, Params, Preset, Settings, TensorMap,
};
use fathom_ptx::table::{FormId, forms};

/// One input or output: name, type and a value for each thread.
struct Operand {
    name: String,
    ty: String,
    values: Vec<String>,
}

#[derive(Default)]
struct Case {
    name: String,
    inputs: Vec<Operand>,
    outputs: Vec<Operand>,
    threads: usize,
    cluster: usize,
    map: Option<String>,
    refused: Option<String>,
    module: String,
    body: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/instructions")
}

fn cases() -> Vec<Case> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("tests/instructions")
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "ptx"))
        .collect();
    paths.sort();
    paths.iter().map(|path| parse(path)).collect()
}

fn parse(path: &Path) -> Case {
    let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
    let text = std::fs::read_to_string(path).expect("a case");
    let mut case = Case { name, cluster: 1, ..Case::default() };
    for line in text.lines() {
        let Some(directive) = line.strip_prefix("//>") else {
            case.body.push_str(line);
            case.body.push('\n');
            continue;
        };
        let mut words = directive.split_whitespace();
        let key = words.next().unwrap_or("");
        let rest: Vec<String> = words.map(str::to_string).collect();
        match (key, rest.as_slice()) {
            ("in" | "out", [name, ty, equals, values @ ..]) if equals == "=" => {
                let (name, ty, values) = (name.clone(), ty.clone(), values.to_vec());
                let list = if key == "in" { &mut case.inputs } else { &mut case.outputs };
                list.push(Operand { name, ty, values });
            }
            ("threads", [n]) => case.threads = n.parse().expect("a number of threads"),
            ("cluster", [n]) => case.cluster = n.parse().expect("a number of CTAs"),
            ("map", _) => case.map = Some(rest.join(" ")),
            ("refused", _) => case.refused = Some(rest.join(" ")),
            // What stood before is at module scope.
            ("body", []) => case.module = std::mem::take(&mut case.body),
            _ => panic!("{}: `{line}` is not a directive of a case", case.name),
        }
    }
    let longest = case.inputs.iter().chain(&case.outputs).map(|o| o.values.len()).max();
    case.threads = case.threads.max(longest.unwrap_or(1));
    for operand in case.inputs.iter().chain(&case.outputs) {
        let n = operand.values.len();
        let fits = n == 1 || n == case.threads;
        assert!(
            fits,
            "{}: `{}` has {n} values for {} threads",
            case.name, operand.name, case.threads
        );
    }
    case
}

impl Operand {
    fn value(&self, thread: usize) -> &str {
        &self.values[if self.values.len() == 1 { 0 } else { thread }]
    }

    /// Type that loads and stores use.
    fn memory_type(&self) -> &str {
        if self.ty == "pred" { "b32" } else { &self.ty }
    }

    fn mask(&self) -> u64 {
        match self.ty.as_str() {
            "b16" => 0xFFFF,
            "b32" | "f32" | "pred" => 0xFFFF_FFFF,
            _ => u64::MAX,
        }
    }
}

/// The bits that `text` stands for in a register of type `ty`.
fn bits(text: &str, ty: &str, thread: usize) -> u64 {
    if text == "lane" {
        return thread as u64;
    }
    let (negative, magnitude) = match text.strip_prefix('-') {
        Some(m) => (true, m),
        None => (false, text),
    };
    if let Some(hex) = magnitude.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).unwrap_or_else(|e| panic!("{text}: {e}"));
    }
    match ty {
        "f32" => u64::from(text.parse::<f32>().expect(text).to_bits()),
        "f64" => text.parse::<f64>().expect(text).to_bits(),
        _ => {
            let value: u64 = magnitude.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            if negative { value.wrapping_neg() } else { value }
        }
    }
}

impl Case {
    /// The whole module, and the lines of the case's own body.
    fn source(&self) -> (String, std::ops::Range<u32>) {
        let mut s = String::from(".version 8.7\n.target sm_90a\n.address_size 64\n");
        s.push_str(&self.module);
        s.push_str(
            ".visible .entry case_kernel(.param .u64 p_in, .param .u64 p_out, .param .u64 p_scratch,\n\
             .param .u64 p_tensor, .param .align 64 .b8 p_map[128])\n{\n\
             .reg .b32 %t, %_x; .reg .b64 %g, %m, %tensor, %_i, %_o, %_n; .reg .pred %_p;\n\
             .shared .align 1024 .b8 smem[16384];\n",
        );
        for operand in self.inputs.iter().chain(&self.outputs) {
            s.push_str(&format!(".reg .{} %{};\n", operand.ty, operand.name));
        }
        s.push_str(
            "ld.param.u64 %_i, [p_in]; ld.param.u64 %_o, [p_out]; ld.param.u64 %g, [p_scratch];\n\
             ld.param.u64 %tensor, [p_tensor]; mov.u64 %m, p_map; cvta.param.u64 %m, %m;\n\
             mov.u32 %t, %ctaid.x; mov.u32 %_x, %ntid.x; mul.lo.u32 %t, %t, %_x;\n\
             mov.u32 %_x, %tid.x; add.u32 %t, %t, %_x; mul.wide.u32 %_n, %t, 8;\n\
             add.u64 %_i, %_i, %_n; add.u64 %_o, %_o, %_n;\n",
        );
        let stride = 8 * self.threads;
        for (i, operand) in self.inputs.iter().enumerate() {
            let (name, at) = (&operand.name, i * stride);
            if operand.ty == "pred" {
                s.push_str(&format!(
                    "ld.global.u32 %_x, [%_i+{at}]; setp.ne.u32 %{name}, %_x, 0;\n"
                ));
            } else {
                s.push_str(&format!("ld.global.{} %{name}, [%_i+{at}];\n", operand.ty));
            }
        }
        let first = s.lines().count() as u32 + 1;
        s.push_str(&self.body);
        let end = s.lines().count() as u32 + 1;
        for (i, operand) in self.outputs.iter().enumerate() {
            let (name, at, ty) = (&operand.name, i * stride, operand.memory_type());
            if operand.ty == "pred" {
                s.push_str(&format!("selp.b32 %_x, 1, 0, %{name}; "));
                s.push_str(&format!("st.global.b32 [%_o+{at}], %_x;\n"));
            } else {
                s.push_str(&format!("st.global.{ty} [%_o+{at}], %{name};\n"));
            }
        }
        s.push_str("ret;\n}\n");
        (s, first..end)
    }

    /// Forms of the table that the body holds.
    fn covers(&self) -> BTreeSet<FormId> {
        let (source, lines) = self.source();
        let module = fathom_ptx::parse(&source).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let bodies = module.functions.iter().filter_map(|f| f.body.as_ref());
        let own =
            |line: u32| lines.contains(&line) || line < 4 + self.module.lines().count() as u32;
        bodies
            .flat_map(|b| b.instructions())
            .filter(|(_, i)| own(i.pos.line))
            .map(|(_, i)| i.form)
            .collect()
    }

    /// A tensor of u32 that counts its elements, and its map.
    fn tensor(&self, device: &Device) -> (u64, [u8; 128]) {
        let Some(text) = &self.map else { return (0, [0; 128]) };
        let mut map = TensorMap {
            element: MapElement::from_cuda(2).expect("u32"),
            rank: 0,
            address: 0,
            dims: [1; 5],
            strides_bytes: [0; 4],
            box_dims: [1; 5],
            element_strides: [1; 5],
            interleave: 0,
            swizzle: 0,
            l2_promotion: 0,
            fill_nan: false,
            mode: Mode::Tiled,
        };
        let words: Vec<&str> = text.split(' ').collect();
        for pair in words.chunks(2) {
            let sizes = || pair[1].split('x').map(|n| n.parse::<u32>().expect(text));
            match pair[0] {
                "dims" => {
                    sizes().enumerate().for_each(|(i, n)| map.dims[i] = u64::from(n));
                    map.rank = sizes().count() as u32;
                }
                "box" => sizes().enumerate().for_each(|(i, n)| map.box_dims[i] = n),
                "im2col" => {
                    let parts: Vec<&str> = pair[1].split(':').collect();
                    let corner = |text: &str| {
                        let mut out = [0i16; 3];
                        let list = text.split(',').map(|n| n.parse().expect(text));
                        out.iter_mut().zip(list).for_each(|(o, n)| *o = n);
                        out
                    };
                    let number = |i: usize| parts[i].parse().expect(text);
                    let (lower, upper) = (corner(parts[0]), corner(parts[1]));
                    map.mode =
                        Mode::Im2col { lower, upper, channels: number(2), pixels: number(3) };
                }
                "swizzle" => map.swizzle = pair[1].parse().expect(text),
                other => panic!("{}: `{other}` of a map", self.name),
            }
        }
        let count: u64 = map.dims.iter().product();
        let values: Vec<u32> = (0..count as u32).collect();
        map.address = device.upload(&values).expect("memory for a tensor");
        let mut stride = 4;
        for i in 0..4 {
            stride *= map.dims[i];
            map.strides_bytes[i] = stride;
        }
        (map.address, map.encode().unwrap_or_else(|e| panic!("{}: {e:?}", self.name)))
    }

    /// Runs it with and without checks; what is wrong, if anything.
    fn check(&self) -> Result<(), String> {
        let plain = self.run(Checks::default())?;
        let checked = self.run(Checks::ALL)?;
        match plain.iter().zip(&checked).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(i) => Err(format!(
                "word {i}: {:#x} without checks, {:#x} with them",
                plain[i], checked[i]
            )),
        }
    }

    /// The words that it writes, which are those wanted; none where it is refused as it should be.
    fn run(&self, checks: Checks) -> Result<Vec<u64>, String> {
        let (source, _) = self.source();
        let device = Device::new(Preset::named("h800").map_err(|e| format!("{e:?}"))?);
        device.configure(Settings { checks, ..Settings::default() });
        let stop = |e: &dyn std::fmt::Display| format!("{e}");
        let module = Module::load(&device, &source).map_err(|e| stop(&e))?;
        let values: Vec<u64> = self
            .inputs
            .iter()
            .flat_map(|o| (0..self.threads).map(|t| bits(o.value(t), &o.ty, t)))
            .chain([0])
            .collect();
        let input = device.upload(&values).map_err(|e| stop(&e))?;
        let output = device
            .upload(&vec![0u64; self.outputs.len() * self.threads + 1])
            .map_err(|e| stop(&e))?;
        let scratch = device.upload(&vec![0u8; 65536]).map_err(|e| stop(&e))?;
        let (tensor, map) = self.tensor(&device);
        let params = Params::new().with(input).with(output).with(scratch).with(tensor);
        let params = params.with_bytes(&map, 64).into_bytes();
        let (grid, block) = (self.cluster as u32, (self.threads / self.cluster) as u32);
        let mut config = LaunchConfig::new([grid, 1, 1], [block, 1, 1], params);
        config.cluster = [grid, 1, 1];
        let function = module.function("case_kernel").map_err(|e| stop(&e))?;
        let launched = device.launch(&function, &config);
        if let Some(why) = &self.refused {
            let message = launched.err().map_or("it runs".into(), |e| e.to_string());
            return if message.contains(why.as_str()) { Ok(Vec::new()) } else { Err(message) };
        }
        let report = launched.map_err(|e| stop(&e))?;
        if let Some(finding) = report.findings.first() {
            return Err(finding.to_string());
        }
        let count = self.outputs.len() * self.threads;
        let got: Vec<u64> = device.download(output, count).map_err(|e| stop(&e))?;
        for (i, operand) in self.outputs.iter().enumerate() {
            for thread in 0..self.threads {
                let text = operand.value(thread);
                if text == "any" {
                    continue;
                }
                let want = bits(text, &operand.ty, thread) & operand.mask();
                let got = got[i * self.threads + thread] & operand.mask();
                if want != got {
                    let name = &operand.name;
                    return Err(format!(
                        "%{name} of thread {thread}: want {want:#x}, got {got:#x}"
                    ));
                }
            }
        }
        Ok(got)
    }
}

#[test]
fn cases_hold() {
    let mut failed = Vec::new();
    for case in cases() {
        if let Err(message) = case.check() {
            failed.push(format!("{}: {message}", case.name));
        }
    }
    assert!(failed.is_empty(), "{} cases fail:\n{}", failed.len(), failed.join("\n"));
}

/// `instructions/uncovered.txt`: a syntax (or its beginning, with `*`), two spaces, the reason.
fn uncovered() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(folder().join("uncovered.txt")).expect("uncovered.txt");
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (syntax, why) =
                line.split_once("  ").unwrap_or_else(|| panic!("no reason: {line}"));
            (syntax.to_string(), why.trim().to_string())
        })
        .collect()
}

#[test]
fn every_form_has_a_case_or_a_reason() {
    let covered: BTreeSet<FormId> = cases().iter().flat_map(Case::covers).collect();
    let reasons = uncovered();
    let mut used = BTreeSet::new();
    let mut missing = Vec::new();
    for (i, form) in forms().iter().enumerate() {
        let syntax = form.syntax();
        let reason = reasons.keys().find(|key| match key.strip_suffix('*') {
            Some(start) => syntax.starts_with(start),
            None => **key == syntax,
        });
        used.extend(reason.cloned());
        // What only later architectures have is refused on the emulated ones.
        let target = form.row.since.split(" sm_").nth(1).unwrap_or("0");
        let later = target.trim_end_matches(['a', 'f']).parse::<u32>().expect("a target") > 90;
        let here = covered.contains(&FormId(i as u16));
        if !here && !later && reason.is_none() && !form.recognised() {
            missing.push(syntax);
        }
    }
    assert!(missing.is_empty(), "{} forms without a case:\n{}", missing.len(), missing.join("\n"));
    let stale: Vec<&String> = reasons.keys().filter(|key| !used.contains(*key)).collect();
    assert!(stale.is_empty(), "no such form: {stale:?}");
}
