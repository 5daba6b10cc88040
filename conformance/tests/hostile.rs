//! Cases that somebody might write by mistake: every op's example with other parameters, absent
//! inputs, other shapes, dtypes and values. Each is computed or refused; none panics.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use fathom_reference::op::{OPS, ReferenceEngine, op_from};
use fathom_reference::{Case, Engine, Tensor};
use fathom_trace::DType;
use serde_json::{Value, json};

/// Where the last panic was; also of a thread that works for the one that is asked.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Computes or refuses a case; the place of the panic where it does neither.
fn panic_of(op: &str, params: &Value, case: &Case) -> Option<String> {
    let attempt = || {
        let op = op_from(op, params).ok()?;
        let case = Case { op, inputs: case.inputs.clone() };
        let announced = case.infer().ok()?;
        let sizes = |shape: &[usize]| shape.iter().map(|&n| n as u128).product::<u128>();
        let elements: u128 = announced.iter().map(|m| sizes(&m.shape)).sum();
        // What would fill the memory is refused where files are read.
        if elements > 1 << 24 {
            return None;
        }
        ReferenceEngine.run(&case).ok()
    };
    catch_unwind(AssertUnwindSafe(attempt)).err().map(|_| LAST.lock().unwrap().clone())
}

/// Each number of the parameters in turn becomes each of a few others.
fn other_params(params: &Value) -> Vec<Value> {
    let numbers = [json!(0), json!(1), json!(2), json!(3), json!(7), json!(1000), json!(i32::MAX)];
    let others = |value: &Value| match value {
        Value::Number(n) if n.is_u64() => numbers.to_vec(),
        Value::Number(_) => vec![json!(0.0), json!(-1.0), json!(1e300)],
        Value::Bool(b) => vec![json!(!b)],
        Value::Array(a) => {
            let mut others = vec![json!([]), json!([0]), json!([2, 2, 0, 1]), json!([i32::MAX])];
            for i in 0..a.len() {
                for number in numbers.iter().chain([&Value::Null]) {
                    let mut changed = a.clone();
                    changed[i] = number.clone();
                    others.push(changed.into());
                }
            }
            others
        }
        Value::String(s) if s.contains('F') => DType::ALL.iter().map(|d| json!(d.name())).collect(),
        Value::String(_) => ["nt", "nn", "tn", "softmax", "e5m2", "e5m6", "chain", "f32"]
            .map(|word| json!(word))
            .to_vec(),
        _ => vec![json!(1)],
    };
    let mut all = Vec::new();
    for (key, value) in params.as_object().unwrap() {
        for other in others(value) {
            let mut changed = params.clone();
            changed[key] = other;
            all.push(changed);
        }
        for (part, value) in value.as_object().into_iter().flatten() {
            for other in others(value) {
                let mut changed = params.clone();
                changed[key][part] = other;
                all.push(changed);
            }
        }
    }
    all
}

/// Each input in turn absent, of other sizes, of other dtypes, of strange values.
fn other_inputs(case: &Case) -> Vec<(String, Case)> {
    let mut all = Vec::new();
    for (role, tensor) in &case.inputs {
        let mut with = |what: &str, other: Option<Tensor>| {
            let mut inputs = case.inputs.clone();
            inputs.remove(role);
            inputs.extend(other.map(|tensor| (role.clone(), tensor)));
            all.push((format!("{role} {what}"), Case { op: case.op.boxed(), inputs }));
        };
        with("absent", None);
        let shape = tensor.shape();
        for i in 0..shape.len() {
            for size in [0, 1, shape[i] + 1] {
                let mut shape = shape.to_vec();
                shape[i] = size;
                with(&format!("{shape:?}"), Some(Tensor::zeros(tensor.dtype(), &shape)));
            }
        }
        with("[]", Some(Tensor::zeros(tensor.dtype(), &[])));
        with("[1, ..]", Some(tensor.clone().reshape(&[&[1], shape].concat())));
        for dtype in DType::ALL {
            with(dtype.name(), Some(Tensor::zeros(dtype, shape)));
        }
        for byte in [0x00, 0x7F, 0x80, 0xFF] {
            let bytes = vec![byte; tensor.bytes().len()];
            let strange = Tensor::from_bytes(tensor.dtype(), shape, &bytes);
            with(&format!("all {byte:#x}"), Some(strange));
        }
        if tensor.dtype() == DType::I32 {
            for index in [-2, 5, 100, i32::MAX, i32::MIN] {
                with(
                    &format!("all {index}"),
                    Some(Tensor::from_vec(shape, vec![index; tensor.len()])),
                );
            }
        }
    }
    // Every size of 1 and more that a file can do without.
    let mut inputs = case.inputs.clone();
    for tensor in inputs.values_mut() {
        let shape: Vec<usize> = tensor.shape().iter().map(|_| 0).collect();
        *tensor = Tensor::zeros(tensor.dtype(), &shape);
    }
    all.push(("all without elements".to_owned(), Case { op: case.op.boxed(), inputs }));
    all
}

/// One line a place in the code, with the first case that comes there.
#[test]
fn no_change_of_an_example_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or(String::new(), ToString::to_string);
        *LAST.lock().unwrap() = place;
    }));
    let mut panics: BTreeMap<(&str, String), String> = BTreeMap::new();
    let mut tried = 0;
    for op in OPS {
        let case = (op.example)().case();
        let params = case.op.params();
        let others = other_params(&params);
        let mut cases = other_inputs(&case);
        cases.push(("as it is".to_owned(), case));
        for (what, case) in &cases {
            for params in others.iter().chain([&params]) {
                tried += 1;
                if let Some(place) = panic_of(op.name, params, case) {
                    let case = format!("{what}, params {params}");
                    panics.entry((op.name, place)).or_insert(case);
                }
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(tried > 10_000, "only {tried} cases");
    assert!(panics.is_empty(), "{} panics of {tried} cases: {panics:#?}", panics.len());
}
