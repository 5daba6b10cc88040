//! Lanes of a warp that part: what each computes does not depend on which others run, in which
//! order, or with which checks.

mod members;
mod registers;

use fathom_emulator::{Checks, Device, Finding, LaunchConfig, Module, Params, Preset, Settings};

/// How the groups of a warp take turns.
#[derive(Clone, Copy, Debug)]
struct Turns {
    seed: u64,
    quantum: u32,
    checks: Checks,
}

const ONE_TURN: Turns = Turns { seed: 0, quantum: 2000, checks: NO_CHECKS };
const NO_CHECKS: Checks = Checks { memory: false, races: false, uninit: false, sync: false };

fn all_turns() -> Vec<Turns> {
    let mut list = Vec::new();
    for checks in [NO_CHECKS, Checks::ALL] {
        for (seed, quantum) in [(0, 2000), (0, 1), (1, 3), (7, 1), (99, 17)] {
            list.push(Turns { seed, quantum, checks });
        }
    }
    list
}

/// Runs kernel `k(.param .u64 out, .param .u32 n)` on a warp: its 32 results, and what was found.
fn launch(text: &str, n: u32, turns: Turns) -> (Vec<u64>, Vec<Finding>) {
    let device = Device::new(Preset::named("h800").unwrap());
    device.configure(Settings {
        checks: turns.checks,
        schedule_seed: turns.seed,
        quantum: turns.quantum,
        ..Settings::default()
    });
    let module = Module::load(&device, text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let function = module.function("k").unwrap();
    let out = device.upload(&[0u64; 32]).unwrap();
    let params = Params::new().with(out).with(n).into_bytes();
    let report = device.launch(&function, &LaunchConfig::new([1; 3], [32, 1, 1], params));
    let report = report.unwrap_or_else(|e| panic!("{turns:?}: {e}\n{text}"));
    (device.download(out, 32).unwrap(), report.findings)
}

/// As [`launch`], of a kernel without faults.
fn run(text: &str, n: u32, turns: Turns) -> Vec<u64> {
    let (results, findings) = launch(text, n, turns);
    assert_eq!(findings, [], "{turns:?}\n{text}");
    results
}

fn check(text: &str, n: u32, want: &[u64]) {
    for turns in all_turns() {
        assert_eq!(run(text, n, turns), want, "{turns:?}\n{text}");
    }
}

const HEAD: &str = ".version 8.0\n.target sm_90\n.address_size 64\n";
