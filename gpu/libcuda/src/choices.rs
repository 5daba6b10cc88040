//! What a user can choose about an emulated run, and how that reaches the library: in the
//! environment.

use std::ffi::OsString;
use std::path::PathBuf;

/// Most devices that a process is given.
pub const MOST_DEVICES: u8 = 16;

/// What a user can choose about an emulated run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Name of the GPU to be, one of the presets (`h100`, `h800`, ..).
    pub gpu: String,
    /// Devices of that kind.
    pub devices: usize,
    /// Sanitizers, as `fathom_emulator::Checks::parse` reads them.
    pub check: String,
    /// Folder for kernel traces.
    pub trace: Option<PathBuf>,
    /// Whether kernel records count transactions and bank conflicts.
    pub profile: bool,
    /// Permutes the order of warps and CTAs.
    pub schedule_seed: u64,
    /// What follows a finding that stops a kernel.
    pub on_finding: OnFinding,
    /// Folder in which every process leaves its summary.
    pub summary: Option<PathBuf>,
}

/// What follows a finding that stops a kernel, such as an access out of bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFinding {
    /// It is reported, and the program goes on as if the kernel had ended there.
    Report,
    /// As on hardware: the context is lost, and every later call says so.
    #[default]
    Context,
    /// The process is aborted.
    Abort,
}

impl OnFinding {
    /// Every choice with the word for it.
    pub const ALL: [(&str, OnFinding); 3] = [
        ("report", OnFinding::Report),
        ("context", OnFinding::Context),
        ("abort", OnFinding::Abort),
    ];

    /// The choice that a word stands for.
    pub fn named(word: &str) -> Option<OnFinding> {
        Self::ALL.iter().find(|(name, _)| *name == word).map(|(_, choice)| *choice)
    }

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, choice)| *choice == self).expect("all are listed").0
    }
}

impl Default for Choices {
    fn default() -> Self {
        Choices {
            gpu: "h800".to_owned(),
            devices: 1,
            check: String::new(),
            trace: None,
            profile: false,
            schedule_seed: 0,
            on_finding: OnFinding::default(),
            summary: None,
        }
    }
}

/// What the names of the environment's variables begin with.
pub(crate) const PREFIX: &str = "FATHOM_EMULATE_";

impl Choices {
    /// The choices that the environment carries; what is absent or unreadable is the default.
    pub fn from_environment() -> Choices {
        let text = |name: &str| std::env::var(format!("{PREFIX}{name}")).ok();
        let path = |name: &str| std::env::var_os(format!("{PREFIX}{name}")).map(PathBuf::from);
        let default = Choices::default();
        Choices {
            gpu: text("GPU").unwrap_or(default.gpu),
            devices: text("DEVICES").and_then(|t| t.parse().ok()).unwrap_or(default.devices),
            check: text("CHECK").unwrap_or_default(),
            trace: path("TRACE"),
            profile: text("PROFILE").is_some_and(|t| t == "1"),
            schedule_seed: text("SEED").and_then(|t| t.parse().ok()).unwrap_or(0),
            on_finding: text("ON_FINDING").and_then(|t| OnFinding::named(&t)).unwrap_or_default(),
            summary: path("SUMMARY"),
        }
    }

    /// The environment that carries these choices.
    pub(crate) fn variables(&self) -> Vec<(String, OsString)> {
        let mut all = vec![
            ("GPU", OsString::from(&self.gpu)),
            ("DEVICES", self.devices.to_string().into()),
            ("CHECK", OsString::from(&self.check)),
            ("SEED", self.schedule_seed.to_string().into()),
            ("PROFILE", u8::from(self.profile).to_string().into()),
            ("ON_FINDING", self.on_finding.name().into()),
        ];
        all.extend(self.trace.as_ref().map(|p| ("TRACE", p.clone().into_os_string())));
        all.extend(self.summary.as_ref().map(|p| ("SUMMARY", p.clone().into_os_string())));
        all.into_iter().map(|(name, value)| (format!("{PREFIX}{name}"), value)).collect()
    }
}
