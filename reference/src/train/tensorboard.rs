//! TensorBoard event files: TFRecord framing, masked CRC-32C, and the few protocol-buffer fields
//! that scalars and texts need, written by hand.
//!
//! A record is `u64 length, masked crc32c(length), data, masked crc32c(data)`, little-endian, with
//! mask(c) = rotate_right(c, 15) + 0xA282EAD8 (TensorFlow, `core/lib/io/record_writer.h`). The data
//! is a `tensorboard.Event` (`event.proto`): wall_time = 1, step = 2, file_version = 3,
//! summary = 5, session_log = 7.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes one event file of a run.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Creates a file of its own in `folder`. `step` is where the run goes on: TensorBoard then
    /// drops what earlier files say of later steps.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(folder: &Path, step: u64) -> io::Result<EventWriter> {
        std::fs::create_dir_all(folder)?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let process = std::process::id();
        let (seconds, nanos) = (time.as_secs(), time.subsec_nanos());
        let name = format!("events.out.tfevents.{seconds:010}.fathom.{process}.{nanos}");
        let path = folder.join(name);
        let file = OpenOptions::new().append(true).create_new(true).open(&path)?;
        let mut writer = EventWriter { file, path };
        let mut version = event(0);
        bytes(&mut version, 3, b"brain.Event:2");
        writer.record(&version)?;
        if step > 0 {
            let mut start = event(step + 1);
            let mut session = Vec::new();
            varint(&mut session, 1, 1);
            bytes(&mut start, 7, &session);
            writer.record(&start)?;
        }
        Ok(writer)
    }

    /// The event file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes numbers of a step, each under its tag; TensorBoard keeps them as F32.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut field = Vec::new();
            bytes(&mut field, 1, tag.as_bytes());
            key(&mut field, 2, 5);
            field.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &field);
        }
        let mut data = event(step);
        bytes(&mut data, 5, &summary);
        self.record(&data)
    }

    /// Writes a text of a step under a tag.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> io::Result<()> {
        // Value { tag = 1, tensor = 8, metadata = 9 }; TensorProto { dtype = 1 (string is 7),
        // shape = 2, string_val = 8 }; metadata { plugin_data = 1 { plugin_name = 1 } }.
        let (mut plugin, mut metadata) = (Vec::new(), Vec::new());
        bytes(&mut plugin, 1, b"text");
        bytes(&mut metadata, 1, &plugin);
        let (mut size, mut shape, mut tensor) = (Vec::new(), Vec::new(), Vec::new());
        varint(&mut size, 1, 1);
        bytes(&mut shape, 2, &size);
        varint(&mut tensor, 1, 7);
        bytes(&mut tensor, 2, &shape);
        bytes(&mut tensor, 8, text.as_bytes());
        let (mut value, mut summary) = (Vec::new(), Vec::new());
        bytes(&mut value, 1, tag.as_bytes());
        bytes(&mut value, 8, &tensor);
        bytes(&mut value, 9, &metadata);
        bytes(&mut summary, 1, &value);
        let mut data = event(step);
        bytes(&mut data, 5, &summary);
        self.record(&data)
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        self.file.write_all(&frame(data))
    }
}

/// A TFRecord: length and data, each with its masked CRC-32C.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(data);
    record.extend(masked(crc32c(data)).to_le_bytes());
    record
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), bit by bit: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            let low = (crc & 1).wrapping_neg();
            crc = (crc >> 1) ^ (0x82F6_3B78 & low);
        }
    }
    !crc
}

fn event(step: u64) -> Vec<u8> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut data = Vec::new();
    key(&mut data, 1, 1);
    data.extend(time.as_secs_f64().to_le_bytes());
    varint(&mut data, 2, step);
    data
}

fn raw_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Field number and wire type: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
fn key(out: &mut Vec<u8>, field: u64, wire: u64) {
    raw_varint(out, field << 3 | wire);
}

fn varint(out: &mut Vec<u8>, field: u64, value: u64) {
    key(out, field, 0);
    raw_varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, 2);
    raw_varint(out, value.len() as u64);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_castagnolis() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46DD_794E);
    }

    #[test]
    fn a_file_is_a_chain_of_records() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), 7).unwrap();
        writer.scalars(300, &[("loss".into(), 2.5)]).unwrap();
        writer.text(301, "sample", "text").unwrap();
        let all = std::fs::read(writer.path()).unwrap();
        let mut rest = &all[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let data = &rest[12..12 + length];
            assert_eq!(frame(data), rest[..16 + length]);
            records.push(data.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 4);
        // wall_time, then step 300 = [0xAC, 0x02], then the summary with tag and simple_value.
        let scalar = &records[2];
        assert_eq!((scalar[0], &scalar[9..12]), (0x09, &[0x10, 0xAC, 0x02][..]));
        assert_eq!(scalar[12..], *b"\x2A\x0D\x0A\x0B\x0A\x04loss\x15\x00\x00\x20\x40");
    }
}
