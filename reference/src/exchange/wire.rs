//! What processes say to each other, as bytes: a header in JSON, then the elements of the tensors.
//!
//! ```text
//! u32  bytes of the header, little-endian
//!      header: JSON of [`Header`], with dtype and shape of every tensor
//!      elements of the tensors, one after the other, little-endian and row-major
//! ```

use std::io::{self, Read, Write};

use fathom_trace::DType;
use serde::{Deserialize, Serialize};

use super::mail::Wait;
use super::{Label, Message, Operation};
use crate::Tensor;

/// What one process says to another.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    /// A message of an exchange.
    Message(Message),
    /// What do you wait for?
    Ask,
    /// What the sender waits for.
    Waits(Wait),
    /// The first rank that the sender knows to have failed, and its error.
    Failed(usize, String),
    /// The sender has come to its end and sends no more.
    Ended,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Header {
    Message {
        channel: String,
        number: u64,
        operation: Operation,
        what: String,
        tensors: Vec<(DType, Vec<usize>)>,
    },
    Ask,
    Waits {
        of: Wait,
    },
    Failed {
        rank: usize,
        error: String,
    },
    Ended,
    /// The first of a connection: whose it is, and what only ranks of the run know.
    Hello {
        rank: usize,
        token: String,
    },
}

/// No header is longer: a message has at most some thousands of tensors.
const MOST_HEADER: usize = 1 << 26;

/// No greeting is longer; whoever says more is a stranger.
const MOST_HELLO: usize = 1 << 10;

/// No tensor is longer.
const MOST_BYTES: usize = 1 << 40;

impl Frame {
    fn header(&self) -> Header {
        match self {
            Frame::Message(Message { label, tensors }) => Header::Message {
                channel: label.channel.to_string(),
                number: label.number,
                operation: label.operation,
                what: label.what.clone(),
                tensors: tensors.iter().map(|t| (t.dtype(), t.shape().to_vec())).collect(),
            },
            Frame::Ask => Header::Ask,
            Frame::Waits(of) => Header::Waits { of: of.clone() },
            Frame::Failed(rank, error) => Header::Failed { rank: *rank, error: error.clone() },
            Frame::Ended => Header::Ended,
        }
    }

    fn tensors(&self) -> &[Tensor] {
        match self {
            Frame::Message(message) => &message.tensors,
            _ => &[],
        }
    }

    /// Writes the frame.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        write_header(to, &self.header())?;
        self.tensors().iter().try_for_each(|tensor| to.write_all(tensor.bytes()))
    }

    /// Reads the next frame.
    ///
    /// # Errors
    /// Those of the reader; [`io::ErrorKind::InvalidData`] where what comes is no frame.
    pub fn read(from: &mut impl Read) -> io::Result<Frame> {
        Ok(match read_header(from, MOST_HEADER)? {
            Header::Message { channel, number, operation, what, tensors } => {
                let label = Label { channel: channel.into(), number, operation, what };
                let read = |(dtype, shape): (DType, Vec<usize>)| tensor(from, dtype, &shape);
                let tensors = tensors.into_iter().map(read).collect::<io::Result<_>>()?;
                Frame::Message(Message { label, tensors })
            }
            Header::Ask => Frame::Ask,
            Header::Waits { of } => Frame::Waits(of),
            Header::Failed { rank, error } => Frame::Failed(rank, error),
            Header::Ended => Frame::Ended,
            Header::Hello { .. } => return Err(invalid("a second greeting".to_owned())),
        })
    }
}

/// Begins a connection: says whose it is.
///
/// # Errors
/// Those of the writer.
pub(super) fn write_hello(to: &mut impl Write, rank: usize, token: &str) -> io::Result<()> {
    write_header(to, &Header::Hello { rank, token: token.to_owned() })
}

/// Reads whose a connection is, and the token. Whoever has connected is not known yet: nothing is
/// read or kept room for but a greeting.
///
/// # Errors
/// As [`Frame::read`].
pub(super) fn read_hello(from: &mut impl Read) -> io::Result<(usize, String)> {
    match read_header(from, MOST_HELLO)? {
        Header::Hello { rank, token } => Ok((rank, token)),
        _ => Err(invalid("no greeting".to_owned())),
    }
}

fn write_header(to: &mut impl Write, header: &Header) -> io::Result<()> {
    let header = serde_json::to_vec(header).expect("plain data");
    let length = u32::try_from(header.len()).map_err(io::Error::other)?;
    let mut begin = length.to_le_bytes().to_vec();
    begin.extend(header);
    to.write_all(&begin)
}

fn read_header(from: &mut impl Read, most: usize) -> io::Result<Header> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > most {
        return Err(invalid(format!("a header of {length} bytes")));
    }
    let mut header = vec![0; length];
    from.read_exact(&mut header)?;
    serde_json::from_slice(&header).map_err(|e| invalid(e.to_string()))
}

fn tensor(from: &mut impl Read, dtype: DType, shape: &[usize]) -> io::Result<Tensor> {
    let bytes = shape.iter().try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n));
    if bytes.is_none_or(|bytes| bytes > MOST_BYTES) {
        return Err(invalid(format!("a tensor {dtype} {shape:?}")));
    }
    let mut result = Ok(());
    let tensor = Tensor::filled(dtype, shape, |bytes| result = from.read_exact(bytes));
    result.map(|()| tensor)
}

fn invalid(found: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected a rank's message, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_and_what_is_none_is_refused() {
        let tensors = vec![
            Tensor::from_vec(&[2, 1], vec![f32::NAN, -0.0]),
            Tensor::zeros(DType::BF16, &[0, 7]),
            Tensor::from_vec(&[3], vec![1u8, 2, 3]),
        ];
        let operation = Operation::AllToAll;
        let label = Label { channel: "rows".into(), number: 7, operation, what: "x \"y\"".into() };
        let frames = [
            Frame::Message(Message { label, tensors }),
            Frame::Ask,
            Frame::Waits(Some((3, "rows".to_owned()))),
            Frame::Waits(None),
            Frame::Failed(2, "no room".to_owned()),
            Frame::Ended,
        ];
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut bytes).unwrap());
        let mut rest = &bytes[..];
        for frame in &frames {
            let read = Frame::read(&mut rest).unwrap();
            // Tensors are equal by their bits.
            assert_eq!(format!("{read:?}"), format!("{frame:?}"));
            assert!(read.tensors() == frame.tensors());
        }
        assert!(rest.is_empty());
        let cut = Frame::read(&mut &bytes[..bytes.len() / 2]).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        for text in ["GET / HTTP/1.1\r\n\r\n", "\x02\0\0\0{}"] {
            let error = Frame::read(&mut text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
        let large = r#"{"kind":"message","channel":"","number":0,"operation":"Send","what":"",
            "tensors":[["F32",[18446744073709551615,3]]]}"#;
        let mut text = (large.len() as u32).to_le_bytes().to_vec();
        text.extend(large.bytes());
        assert!(Frame::read(&mut &text[..]).unwrap_err().to_string().contains("a tensor F32"));
    }

    #[test]
    fn a_connection_begins_with_a_greeting_and_nothing_else_does() {
        let mut hello = Vec::new();
        write_hello(&mut hello, 3, "of this run").unwrap();
        assert_eq!(read_hello(&mut &hello[..]).unwrap(), (3, "of this run".to_owned()));
        let error = Frame::read(&mut &hello[..]).unwrap_err().to_string();
        assert!(error.contains("a second greeting"), "{error}");
        let mut ended = Vec::new();
        Frame::Ended.write(&mut ended).unwrap();
        let long = (1u32 << 20).to_le_bytes();
        for (bytes, found) in [(&ended[..], "no greeting"), (&long, "a header of 1048576 bytes")] {
            let error = read_hello(&mut &bytes[..]).unwrap_err().to_string();
            assert!(error.contains(found), "{error}");
        }
    }
}
