//! A step's report from those of all ranks: losses are added in the order of lanes (micro-batches,
//! each by parts) and stages in which one process adds them, loads as whole numbers.

use std::collections::BTreeMap;

use super::pipeline::Reported;
use super::world::World;
use crate::Tensor;
use crate::exchange::ExchangeError;
use crate::model::{StageReport, StepReport};

/// The step's report, on every rank.
pub(super) fn gather(
    world: &World,
    own: &[Reported],
    step: u64,
) -> Result<StepReport, ExchangeError> {
    let what = format!("losses of step {step}");
    let mut parts: BTreeMap<(usize, usize), StageReport> = BTreeMap::new();
    for tensors in world.all.all_gather(&what, encode(own))? {
        for Reported { lane, stage, report } in decode(&tensors) {
            parts.insert((lane, stage), report);
        }
    }
    let mut by_lane: BTreeMap<usize, Vec<StageReport>> = BTreeMap::new();
    for ((lane, _), report) in parts {
        by_lane.entry(lane).or_default().push(report);
    }
    let mut sum = StepReport::default();
    by_lane.into_values().for_each(|parts| sum.add(StepReport::of_stages(parts)));
    Ok(sum)
}

/// Whole numbers and sums, one after the other.
fn encode(reports: &[Reported]) -> Vec<Tensor> {
    let (mut numbers, mut sums) = (Vec::new(), Vec::new());
    for Reported { lane, stage, report } in reports {
        let StageReport { main, mtp, balance, dropped, loads } = report;
        let lengths = [*lane, *stage, mtp.len(), balance.len(), *dropped, loads.len()];
        numbers.extend(lengths);
        for (layer, counts) in loads {
            numbers.extend([*layer, counts.len()]);
            numbers.extend(counts);
        }
        sums.push(*main);
        sums.extend(mtp);
        sums.extend(balance);
    }
    let numbers: Vec<i64> = numbers.into_iter().map(|n| n as i64).collect();
    vec![Tensor::from_vec(&[numbers.len()], numbers), Tensor::from_vec(&[sums.len()], sums)]
}

fn decode(tensors: &[Tensor]) -> Vec<Reported> {
    let mut numbers = tensors[0].as_slice::<i64>().iter().map(|&n| n as usize);
    let mut sums = tensors[1].as_slice::<f64>().iter().copied();
    let mut reports = Vec::new();
    while let Some(lane) = numbers.next() {
        let mut number = || numbers.next().expect("as encoded");
        let [stage, mtp, balance, dropped, layers] = std::array::from_fn(|_| number());
        let load = |_| {
            let (layer, experts) = (number(), number());
            (layer, (0..experts).map(|_| number()).collect())
        };
        let loads = (0..layers).map(load).collect();
        let main = sums.next().expect("as encoded");
        let mut take = |n: usize| sums.by_ref().take(n).collect::<Vec<f64>>();
        let (mtp, balance) = (take(mtp), take(balance));
        let report = StageReport { main, mtp, balance, dropped, loads };
        reports.push(Reported { lane, stage, report });
    }
    reports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_wire() {
        let report = StageReport {
            main: f64::NAN,
            mtp: vec![1.5, -0.0],
            balance: vec![2.0],
            dropped: 3,
            loads: vec![(4, vec![5, 6]), (7, vec![])],
        };
        let own = [
            Reported { lane: 8, stage: 9, report },
            Reported { lane: 1, stage: 0, report: StageReport::default() },
        ];
        let decoded = decode(&encode(&own));
        assert_eq!(encode(&decoded), encode(&own));
        assert_eq!(decoded[0].report.loads, own[0].report.loads);
        assert_eq!((decoded[1].lane, decoded[1].stage), (1, 0));
    }
}
