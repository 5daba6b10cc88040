//! Text of C's `printf`, from a format and values in guest memory.

use crate::machine::access::Where;
use crate::machine::cx::Cx;
use crate::machine::op::Step;
use crate::machine::registers::LANES;

/// One value of generic memory, for one lane.
fn peek(cx: &mut Cx<'_>, lane: usize, address: u64, bytes: u32) -> Result<u64, Step> {
    let mask = std::mem::replace(&mut cx.mask, 1 << lane);
    let mut out = [[0; LANES]; 4];
    let result = cx.load(Where::Generic, &[address; LANES], bytes, &mut out);
    cx.mask = mask;
    result?;
    Ok(u64::from(out[1][lane]) << 32 | u64::from(out[0][lane]))
}

/// A C string of generic memory, cut after 4096 bytes, for one lane.
pub fn string(cx: &mut Cx<'_>, lane: usize, mut address: u64) -> Result<String, Step> {
    let mut bytes = Vec::new();
    loop {
        let byte = peek(cx, lane, address, 1)? as u8;
        if byte == 0 || bytes.len() > 4096 {
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        bytes.push(byte);
        address += 1;
    }
}

/// Formats as C's printf does, from a list of naturally aligned values.
pub fn print(cx: &mut Cx<'_>, lane: usize, format: u64, list: u64) -> Result<String, Step> {
    let format = string(cx, lane, format)?;
    let mut at = list;
    let mut out = String::new();
    let mut rest = format.as_str();
    while let Some(percent) = rest.find('%') {
        out.push_str(&rest[..percent]);
        rest = &rest[percent + 1..];
        let end =
            rest.find(|c: char| c.is_ascii_alphabetic() && !"hlLqjzt".contains(c) || c == '%');
        let Some(end) = end else { break };
        let (spec, kind) = (&rest[..end], rest.as_bytes()[end]);
        rest = &rest[end + 1..];
        if kind == b'%' {
            out.push('%');
            continue;
        }
        let long = spec.contains("l") || spec.contains(['q', 'j', 'z', 't']);
        let bytes = if long
            || matches!(kind, b's' | b'p')
            || kind.is_ascii_alphabetic() && b"eEfFgGaA".contains(&kind)
        {
            8
        } else {
            4
        };
        at = at.next_multiple_of(u64::from(bytes));
        let value = peek(cx, lane, at, bytes)?;
        at += u64::from(bytes);
        let flags = spec.trim_end_matches(|c: char| "hlLqjzt".contains(c));
        let text = match kind {
            b's' => string(cx, lane, value)?,
            _ => scalar(flags, kind, value, bytes),
        };
        out.push_str(&pad(flags, &text, kind));
    }
    out.push_str(rest);
    Ok(out)
}

fn scalar(flags: &str, kind: u8, value: u64, bytes: u32) -> String {
    let signed = if bytes == 8 { value as i64 } else { i64::from(value as u32 as i32) };
    let precision = flags.split_once('.').and_then(|(_, p)| p.parse::<usize>().ok());
    let float = f64::from_bits(value);
    let plus = if flags.contains('+') && kind != b'u' { "+" } else { "" };
    match kind {
        b'd' | b'i' if signed >= 0 => format!("{plus}{signed}"),
        b'd' | b'i' => signed.to_string(),
        b'u' => value.to_string(),
        b'x' => format!("{value:x}"),
        b'X' => format!("{value:X}"),
        b'o' => format!("{value:o}"),
        b'p' => format!("{value:#x}"),
        b'c' => char::from(value as u8).to_string(),
        b'e' | b'E' => exponent(float, precision.unwrap_or(6)),
        b'g' | b'G' => general(float, precision.unwrap_or(6)),
        _ => format!("{float:.*}", precision.unwrap_or(6)),
    }
}

fn exponent(v: f64, precision: usize) -> String {
    let text = format!("{v:.precision$e}");
    match text.split_once('e') {
        Some((m, e)) => {
            let e: i32 = e.parse().unwrap_or(0);
            format!("{m}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        None => text,
    }
}

fn general(v: f64, precision: usize) -> String {
    let precision = precision.max(1);
    let power = if v == 0.0 || !v.is_finite() { 0 } else { v.abs().log10().floor() as i32 };
    let trim = |s: String| {
        if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.').to_owned() } else { s }
    };
    if power < -4 || power >= precision as i32 {
        let text = exponent(v, precision - 1);
        return match text.split_once('e') {
            Some((m, e)) => format!("{}e{e}", trim(m.to_owned())),
            None => text,
        };
    }
    trim(format!("{v:.*}", (precision as i32 - 1 - power).max(0) as usize))
}

fn pad(flags: &str, text: &str, kind: u8) -> String {
    let left = flags.contains('-');
    let digits = flags.trim_start_matches(['-', '+', ' ', '#']);
    let zero = digits.starts_with('0') && !left && kind != b's';
    let width: usize = digits.split('.').next().and_then(|w| w.parse().ok()).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    match (left, zero) {
        (true, _) => format!("{text}{}", " ".repeat(missing)),
        (_, true) => match text.strip_prefix('-') {
            Some(rest) => format!("-{}{rest}", "0".repeat(missing)),
            None => format!("{}{text}", "0".repeat(missing)),
        },
        _ => format!("{}{text}", " ".repeat(missing)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_as_in_c() {
        assert_eq!(pad("05", &scalar("05", b'd', -42i64 as u64, 8), b'd'), "-0042");
        assert_eq!(scalar(".2", b'f', 2.25159f64.to_bits(), 8), "2.25");
        assert_eq!(scalar("", b'g', 0.0001f64.to_bits(), 8), "0.0001");
        assert_eq!(scalar("", b'g', 1e10f64.to_bits(), 8), "1e+10");
        assert_eq!(scalar("", b'e', 12345.0f64.to_bits(), 8), "1.234500e+04");
        assert_eq!(scalar("", b'd', 0xffff_ffff, 4), "-1");
        assert_eq!(pad("-4", "ab", b's'), "ab  ");
    }
}
