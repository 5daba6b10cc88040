//! Requests: drawn from distributions, or read from a trace of one of two public kinds.
//!
//! - CSV with a header, as the Azure LLM inference traces (`TIMESTAMP,ContextTokens,
//!   GeneratedTokens`; also `arrived_s,prompt,output`), times as seconds or as `date time`;
//! - JSON Lines, as Mooncake's traces (`{"timestamp": milliseconds, "input_length": n,
//!   "output_length": n, "hash_ids": [blocks of 512 tokens]}`).

use std::path::Path;

use serde::Deserialize;

use super::config::{Length, ServeScenario, Workload};
use super::draws::Draws;
use crate::error::{SimError, read_table};

/// A request: when it comes, what it reads and what it is to write.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// Seconds from the start at which it arrives.
    pub arrival_s: f64,
    /// Tokens of its prompt.
    pub prompt: u64,
    /// Tokens of its answer.
    pub output: u64,
    /// Blocks of the prompt by content, where a trace tells them.
    pub blocks: Vec<u64>,
}

/// Tokens of a block that a trace's `hash_ids` name.
pub const BLOCK_TOKENS: u64 = 512;

/// Most requests of a run.
const MOST: usize = 4_000_000;

/// Streams of draws.
const ARRIVAL: u64 = 1;
const PROMPT: u64 = 2;
const OUTPUT: u64 = 3;

/// Where the requests of a run come from.
#[derive(Debug, Clone)]
pub enum Requests {
    /// All of them, by arrival.
    Listed(Vec<Request>),
    /// A new one whenever one ends; `usize` at once.
    Closed(usize),
}

impl Requests {
    /// The requests that a scenario asks for.
    ///
    /// # Errors
    /// [`SimError::Input`] for a trace, with file and line; a run of more requests than can be
    /// kept.
    pub fn of(s: &ServeScenario) -> Result<Requests, SimError> {
        if let Some(n) = s.workload.concurrency {
            return Ok(Requests::Closed(n as usize));
        }
        let mut list = match &s.workload.trace {
            Some(path) => {
                let text = read_table(Path::new(path))?;
                let mut list = parse(path, &text)?;
                let speed = s.workload.trace_speed.unwrap_or(1.0);
                list.iter_mut().for_each(|r| r.arrival_s /= speed);
                list
            }
            None => poisson(s)?,
        };
        list.retain(|r| r.arrival_s < s.duration_s);
        list.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
        Ok(Requests::Listed(list))
    }
}

/// The `index`-th request that arrives at `arrival_s`, its lengths drawn.
pub fn drawn(w: &Workload, seed: u64, index: usize, arrival_s: f64) -> Request {
    let draws = Draws::new(seed);
    let length = |l: &Option<Length>, stream| {
        l.map_or(1, |l| draw_length(&l, draws.normal(stream, index as u64)))
    };
    let (prompt, output) = (length(&w.prompt, PROMPT), length(&w.output, OUTPUT));
    Request { arrival_s, prompt, output, blocks: Vec::new() }
}

/// The length at a standard normal draw `z` of a log-normal law with the mean and deviation asked.
fn draw_length(l: &Length, z: f64) -> u64 {
    let variance = (1.0 + l.cv * l.cv).ln();
    let length = l.mean * (z * variance.sqrt() - variance / 2.0).exp();
    (length.round() as u64).clamp(1, l.max)
}

fn poisson(s: &ServeScenario) -> Result<Vec<Request>, SimError> {
    let rate = s.workload.rate_per_s.unwrap_or(1.0);
    if rate * s.duration_s > MOST as f64 {
        let message = format!(
            "{rate} requests a second for {} s: expected at most {MOST} in all",
            s.duration_s
        );
        return Err(SimError::Layout(message));
    }
    let draws = Draws::new(s.seed);
    let (mut list, mut now) = (Vec::new(), 0.0);
    while now < s.duration_s && list.len() <= MOST {
        now += draws.exponential(ARRIVAL, list.len() as u64) / rate;
        list.push(drawn(&s.workload, s.seed, list.len(), now));
    }
    Ok(list)
}

/// Reads a trace; `file` is named in errors.
///
/// # Errors
/// [`SimError::Input`] with the line, what was expected and what was found.
pub fn parse(file: &str, text: &str) -> Result<Vec<Request>, SimError> {
    let mut list = match text.trim_start().starts_with('{') {
        true => json_lines(file, text)?,
        false => csv(file, text)?,
    };
    if list.is_empty() {
        return Err(SimError::input(file, "no request: expected a line for each"));
    }
    let start = list.iter().map(|r| r.arrival_s).fold(f64::INFINITY, f64::min);
    list.iter_mut().for_each(|r| r.arrival_s -= start);
    Ok(list)
}

/// A line of Mooncake's traces.
#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

fn json_lines(file: &str, text: &str) -> Result<Vec<Request>, SimError> {
    let mut list = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let place = number + 1;
        let l: Line = serde_json::from_str(line).map_err(|e| {
            let message = format!(
                "line {place}: expected {{\"timestamp\": ms, \"input_length\": n, \"output_length\": n}}: {e}"
            );
            SimError::input(file, message)
        })?;
        let arrival_s = l.timestamp / 1e3;
        add(file, place, &mut list, arrival_s, [l.input_length, l.output_length], l.hash_ids)?;
    }
    Ok(list)
}

/// Names of the columns by use.
const COLUMNS: [&[&str]; 3] = [
    &["timestamp", "arrived_s", "arrived_at"],
    &["contexttokens", "prompt", "input_length", "num_prefill_tokens"],
    &["generatedtokens", "output", "output_length", "num_decode_tokens"],
];

fn csv(file: &str, text: &str) -> Result<Vec<Request>, SimError> {
    let mut lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let header = lines.next().map_or("", |(_, l)| l).to_ascii_lowercase();
    let names: Vec<&str> = header.split(',').map(str::trim).collect();
    let mut at = [0; 3];
    for (slot, known) in at.iter_mut().zip(COLUMNS) {
        *slot = names.iter().position(|n| known.contains(n)).ok_or_else(|| {
            let message =
                format!("line 1: expected a column {}, found '{header}'", known.join(" or "));
            SimError::input(file, message)
        })?;
    }
    let mut list = Vec::new();
    for (number, line) in lines {
        let place = number + 1;
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let cell = |i: usize| cells.get(at[i]).copied().unwrap_or_default();
        let wrong = |what: &str, i: usize| {
            SimError::input(file, format!("line {place}: expected {what}, found '{}'", cell(i)))
        };
        let arrival = seconds(cell(0)).ok_or_else(|| wrong("seconds or a date and time", 0))?;
        let tokens = |i: usize| cell(i).parse::<u64>().map_err(|_| wrong("a number of tokens", i));
        add(file, place, &mut list, arrival, [tokens(1)?, tokens(2)?], Vec::new())?;
    }
    Ok(list)
}

/// Seconds of a number, or of `2023-11-16 18:17:03.9799600` since the year's start.
fn seconds(cell: &str) -> Option<f64> {
    if let Ok(number) = cell.parse::<f64>() {
        return Some(number);
    }
    let (date, time) = cell.split_once([' ', 'T'])?;
    let part = |text: &str, i: usize, by: char| text.split(by).nth(i)?.parse::<f64>().ok();
    let time = time.trim_end_matches('Z').split('+').next()?;
    let (month, day) = (part(date, 1, '-')?, part(date, 2, '-')?);
    const BEFORE: [f64; 12] =
        [0.0, 31.0, 59.0, 90.0, 120.0, 151.0, 181.0, 212.0, 243.0, 273.0, 304.0, 334.0];
    let days = BEFORE.get((month as usize).checked_sub(1)?)? + day;
    let clock = part(time, 0, ':')? * 3600.0 + part(time, 1, ':')? * 60.0 + part(time, 2, ':')?;
    Some(days * 86400.0 + clock)
}

fn add(
    file: &str,
    place: usize,
    list: &mut Vec<Request>,
    arrival_s: f64,
    [prompt, output]: [u64; 2],
    blocks: Vec<u64>,
) -> Result<(), SimError> {
    const LONGEST: u64 = 4_000_000;
    let refuse = |message: String| Err(SimError::input(file, format!("line {place}: {message}")));
    if !arrival_s.is_finite() || arrival_s.abs() > 1e12 {
        return refuse(format!("expected a time, found {arrival_s} s"));
    }
    if !(1..=LONGEST).contains(&prompt) || output > LONGEST {
        return refuse(format!("expected 1 to {LONGEST} tokens, found {prompt} and {output}"));
    }
    if list.len() >= MOST {
        return refuse(format!("expected at most {MOST} requests"));
    }
    // An answer has at least the token that ends it.
    list.push(Request { arrival_s, prompt, output: output.max(1), blocks });
    Ok(())
}

/// A prefix cache of blocks: the least recently used go first.
#[derive(Debug, Default)]
pub struct BlockCache {
    capacity: usize,
    used_at: std::collections::BTreeMap<u64, u64>,
    by_use: std::collections::BTreeMap<u64, u64>,
    clock: u64,
}

impl BlockCache {
    /// A cache of `tokens`.
    pub fn new(tokens: u64) -> BlockCache {
        BlockCache { capacity: (tokens / BLOCK_TOKENS) as usize, ..BlockCache::default() }
    }

    /// Tokens of a prompt that are found, from its start to the first block that is not; the
    /// prompt's blocks are held from now on.
    pub fn found(&mut self, request: &Request) -> u64 {
        let held = request.blocks.iter().take_while(|b| self.used_at.contains_key(b)).count();
        for &block in &request.blocks {
            self.clock += 1;
            if let Some(before) = self.used_at.insert(block, self.clock) {
                self.by_use.remove(&before);
            }
            self.by_use.insert(self.clock, block);
            while self.used_at.len() > self.capacity {
                let Some((_, oldest)) = self.by_use.pop_first() else { break };
                self.used_at.remove(&oldest);
            }
        }
        // The last token is always computed: its state gives the answer's first.
        (held as u64 * BLOCK_TOKENS).min(request.prompt - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_traces_read_alike() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5,374,44\n2023-11-16 18:17:05.0,396,0\n";
        let mooncake = "{\"timestamp\": 3500, \"input_length\": 374, \"output_length\": 44, \"hash_ids\": []}\n{\"timestamp\": 5000, \"input_length\": 396, \"output_length\": 1}\n";
        let a = parse("a.csv", azure).unwrap();
        assert_eq!(a, parse("m.jsonl", mooncake).unwrap());
        assert_eq!((a[1].arrival_s, a[1].prompt, a[1].output), (1.5, 396, 1));
    }

    #[test]
    fn the_oldest_block_goes_first() {
        let mut cache = BlockCache::new(3 * BLOCK_TOKENS);
        let ask = |blocks: &[u64]| Request {
            prompt: BLOCK_TOKENS * blocks.len() as u64,
            blocks: blocks.to_vec(),
            ..Request::default()
        };
        assert_eq!(cache.found(&ask(&[1, 2])), 0);
        assert_eq!(cache.found(&ask(&[1, 3])), 512);
        // 1 and 3 are younger than 2, which 4 drives out.
        assert_eq!(cache.found(&ask(&[4])), 0);
        assert_eq!(cache.found(&ask(&[1, 3, 2])), 1024);
        // A whole prompt that is found leaves its last token.
        assert_eq!(cache.found(&ask(&[2])), 511);
    }

    /// Mean and deviation of 50,000 draws, within five standard errors.
    #[test]
    fn lengths_have_the_mean_and_deviation_asked() {
        let length = Length { mean: 500.0, cv: 0.7, max: 1 << 20 };
        let draws = Draws::new(5);
        let n = 50_000;
        let all: Vec<f64> =
            (0..n).map(|i| draw_length(&length, draws.normal(9, i)) as f64).collect();
        let mean = all.iter().sum::<f64>() / n as f64;
        let sd = (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        assert!((mean / 500.0 - 1.0).abs() < 0.016, "{mean}");
        assert!((sd / mean / 0.7 - 1.0).abs() < 0.06, "{sd}");
    }
}
