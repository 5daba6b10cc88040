//! Words for what the machine has: which devices a process sees, where memory lies.

use std::collections::BTreeSet;

/// What host memory of the driver's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    Pinned,
    Managed,
}

/// `CUmemLocation`: a type - 1 a device, 0 none, others of the host - and the device.
pub(crate) type Location = [i32; 2];

/// What was advised of managed memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Advice {
    pub read_mostly: bool,
    pub preferred: Option<Location>,
    /// Devices, -1 for the host.
    pub accessed_by: BTreeSet<i32>,
    pub prefetched: Option<Location>,
}

/// The devices of the machine that CUDA_VISIBLE_DEVICES leaves, in its order: numbers, or UUIDs by
/// their beginning. As with NVIDIA's driver the first word that names no further device ends it.
pub(crate) fn visible(count: usize, list: Option<&str>) -> Vec<i32> {
    let all = 0..count as i32;
    let Some(list) = list else { return all.collect() };
    let mut chosen = Vec::new();
    for word in list.split(',').map(str::trim) {
        let named = |device: &i32| match word.parse::<i32>() {
            Ok(number) => *device == number,
            Err(_) => word.len() > 4 && uuid_text(*device).starts_with(word),
        };
        match all.clone().find(named) {
            Some(device) if !chosen.contains(&device) => chosen.push(device),
            _ => break,
        }
    }
    chosen
}

/// UUID of a device of the machine as tools write it: `GPU-66617468-...`.
pub(crate) fn uuid_text(physical: i32) -> String {
    let digits: String = uuid(physical).iter().map(|b| format!("{b:02x}")).collect();
    let part = |range: std::ops::Range<usize>| &digits[range];
    let parts = [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)];
    format!("GPU-{}", parts.join("-"))
}

/// CUDA version that the driver claims: 13.5, whose PTX is 9.5.
pub(crate) const CUDA_VERSION: i32 = 13050;

/// The PCI bus that a device of the machine has for itself; domain and device number are 0.
pub(crate) fn pci_bus(physical: i32) -> i32 {
    physical + 1
}

/// UUID of a device of the machine.
pub(crate) fn uuid(physical: i32) -> [u8; 16] {
    let mut id = *b"fathom emulated\0";
    id[15] = physical as u8;
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_chosen_by_number_and_by_uuid() {
        assert_eq!(visible(3, None), [0, 1, 2]);
        assert_eq!(visible(3, Some("2,0")), [2, 0]);
        assert_eq!(visible(3, Some(" 1 ")), [1]);
        // What names no device, or one again, ends the list.
        assert_eq!(visible(3, Some("1,7,0")), [1]);
        assert_eq!(visible(3, Some("1,1,0")), [1]);
        for none in ["", "-1", "none", "GPU-"] {
            assert!(visible(3, Some(none)).is_empty(), "{none}");
        }
        let second = uuid_text(1);
        assert_eq!(second, "GPU-66617468-6f6d-2065-6d75-6c6174656401");
        assert_eq!(visible(3, Some(&format!("{second},2"))), [1, 2]);
    }
}
