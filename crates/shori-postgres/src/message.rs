//! Messages of the output plugin `pgoutput`, protocol versions 1 to 4, borrowed from the bytes they came in.
//!
//! # Constraints
//!
//! - Any bytes decode to a message or fail with [`ErrorKind::Data`] and the message's name. A message must be used up.
//! - Messages between [`Message::StreamStart`] and [`Message::StreamStop`] have a transaction id that others lack, and
//!   nothing in their bytes tells: the caller keeps count of where it is.
//!
//! # Layout
//!
//! PostgreSQL documentation, "Logical Replication Message Formats". Numbers are big endian. Messages about prepared
//! transactions, which only come when `two_phase` is asked for, are unknown.

use shori_core::position::Micros;
use shori_core::{Error, ErrorKind, Result};

use crate::reader::{Fault, Reader};

/// Microseconds from 1970-01-01 to 2000-01-01, where PostgreSQL counts from.
pub(crate) const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// A place in the write-ahead log, in bytes.
pub type WalLocation = u64;

/// `xid` is the transaction's id where the message stands in a streamed block, else `None`; of a message of a
/// subtransaction it is the subtransaction's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message<'a> {
    Begin {
        /// [`Message::Commit`]'s `commit_lsn`.
        final_lsn: WalLocation,
        commit_time: Micros,
        xid: u32,
    },
    Commit {
        /// Where the commit record begins.
        commit_lsn: WalLocation,
        /// Where it ends.
        end_lsn: WalLocation,
        commit_time: Micros,
    },
    /// The transaction was replicated to this server from another one.
    Origin {
        commit_lsn: WalLocation,
        name: &'a str,
    },
    /// Comes before the first change of a table, and again after the table has changed.
    Relation(Relation<'a>),
    Type {
        xid: Option<u32>,
        oid: u32,
        /// Empty for `pg_catalog`.
        namespace: &'a str,
        name: &'a str,
    },
    Insert {
        xid: Option<u32>,
        relation: u32,
        new: Tuple<'a>,
    },
    Update {
        xid: Option<u32>,
        relation: u32,
        old: OldTuple<'a>,
        new: Tuple<'a>,
    },
    Delete {
        xid: Option<u32>,
        relation: u32,
        /// Never [`OldTuple::None`].
        old: OldTuple<'a>,
    },
    Truncate {
        xid: Option<u32>,
        cascade: bool,
        restart_identity: bool,
        relations: Vec<u32>,
    },
    /// What `pg_logical_emit_message` wrote.
    Logical {
        xid: Option<u32>,
        transactional: bool,
        lsn: WalLocation,
        prefix: &'a str,
        content: &'a [u8],
    },
    /// A block of a transaction that has not ended begins.
    StreamStart {
        xid: u32,
        /// Whether it is the transaction's first block.
        is_first: bool,
    },
    StreamStop,
    StreamCommit {
        xid: u32,
        commit_lsn: WalLocation,
        end_lsn: WalLocation,
        commit_time: Micros,
    },
    /// What `sub_xid` did is rolled back: the whole transaction if it is `xid`.
    StreamAbort {
        xid: u32,
        sub_xid: u32,
        /// With `streaming = parallel` only (protocol version 4).
        abort: Option<Abort>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Abort {
    pub lsn: WalLocation,
    pub time: Micros,
}

/// A table as the messages after this one send it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relation<'a> {
    pub xid: Option<u32>,
    pub oid: u32,
    /// Empty for `pg_catalog`.
    pub namespace: &'a str,
    pub name: &'a str,
    pub replica_identity: ReplicaIdentity,
    pub columns: Vec<RelationColumn<'a>>,
}

/// What is sent of a row before a change (`relreplident` in `pg_class`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplicaIdentity {
    PrimaryKey,
    Nothing,
    Full,
    Index,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RelationColumn<'a> {
    /// Part of the replica identity.
    pub is_key: bool,
    pub name: &'a str,
    /// A domain's is its own, not its base type's.
    pub type_oid: u32,
    /// `atttypmod`; -1 for none.
    pub type_modifier: i32,
}

/// What is sent of a row before a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OldTuple<'a> {
    /// The columns of the replica identity did not change.
    None,
    /// The columns of the replica identity; the others are null.
    Key(Tuple<'a>),
    /// All columns.
    Full(Tuple<'a>),
}

/// A row: as many values as its relation has columns, in their order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuple<'a> {
    columns: u16,
    /// `columns` values that are known to be well formed.
    values: &'a [u8],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value<'a> {
    Null,
    /// Kept out of line (TOAST), and not sent because the update did not change it.
    Unchanged,
    /// As the type's output function prints it.
    Text(&'a [u8]),
    /// As the type's send function writes it.
    Binary(&'a [u8]),
}

impl<'a> Tuple<'a> {
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// Bytes that the values came in.
    pub fn byte_len(&self) -> usize {
        self.values.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut reader = Reader::new(self.values);
        (0..self.columns).map_while(move |_| reader.value().ok())
    }
}

impl<'a> OldTuple<'a> {
    pub fn tuple(&self) -> Option<Tuple<'a>> {
        match self {
            OldTuple::None => None,
            OldTuple::Key(tuple) | OldTuple::Full(tuple) => Some(*tuple),
        }
    }
}

/// Decodes one message. `in_stream` is whether it stands between a [`Message::StreamStart`] and its end.
pub fn decode(bytes: &[u8], in_stream: bool) -> Result<Message<'_>> {
    let fail = |kind: &str, fault: String| {
        Error::new(ErrorKind::Data, "decode", format!("a {kind} message of logical replication"), fault)
    };
    let Some((&tag, body)) = bytes.split_first() else {
        return Err(fail("PostgreSQL", "it is empty".into()));
    };
    let (name, read) = kind_of(tag).ok_or_else(|| fail("PostgreSQL", format!("its kind 0x{tag:02x} is unknown")))?;
    let mut reader = Reader::new(body);
    let message = read(&mut reader, in_stream).map_err(|fault| fail(name, fault.into()))?;
    match reader.rest().len() {
        0 => Ok(message),
        trailing => Err(fail(name, format!("{trailing} bytes follow its end"))),
    }
}

type Read = for<'a> fn(&mut Reader<'a>, bool) -> Result<Message<'a>, Fault>;

fn kind_of(tag: u8) -> Option<(&'static str, Read)> {
    Some(match tag {
        b'B' => ("Begin", |reader, _| reader.begin()),
        b'C' => ("Commit", |reader, _| reader.commit()),
        b'O' => ("Origin", |reader, _| Ok(Message::Origin { commit_lsn: reader.u64()?, name: reader.string()? })),
        b'R' => ("Relation", |reader, in_stream| reader.relation(in_stream)),
        b'Y' => ("Type", |reader, in_stream| reader.type_name(in_stream)),
        b'I' => ("Insert", |reader, in_stream| reader.insert(in_stream)),
        b'U' => ("Update", |reader, in_stream| reader.update(in_stream)),
        b'D' => ("Delete", |reader, in_stream| reader.delete(in_stream)),
        b'T' => ("Truncate", |reader, in_stream| reader.truncate(in_stream)),
        b'M' => ("Message", |reader, in_stream| reader.logical(in_stream)),
        b'S' => {
            ("Stream Start", |reader, _| Ok(Message::StreamStart { xid: reader.u32()?, is_first: reader.u8()? == 1 }))
        }
        b'E' => ("Stream Stop", |_, _| Ok(Message::StreamStop)),
        b'c' => ("Stream Commit", |reader, _| reader.stream_commit()),
        b'A' => ("Stream Abort", |reader, _| reader.stream_abort()),
        _ => return None,
    })
}

impl<'a> Reader<'a> {
    fn begin(&mut self) -> Result<Message<'a>, Fault> {
        Ok(Message::Begin { final_lsn: self.u64()?, commit_time: self.time()?, xid: self.u32()? })
    }

    fn commit(&mut self) -> Result<Message<'a>, Fault> {
        self.no_flags()?;
        Ok(Message::Commit { commit_lsn: self.u64()?, end_lsn: self.u64()?, commit_time: self.time()? })
    }

    fn relation(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let (xid, oid) = (self.xid(in_stream)?, self.u32()?);
        let (namespace, name) = (self.string()?, self.string()?);
        let replica_identity = match self.u8()? {
            b'd' => ReplicaIdentity::PrimaryKey,
            b'n' => ReplicaIdentity::Nothing,
            b'f' => ReplicaIdentity::Full,
            b'i' => ReplicaIdentity::Index,
            _ => return Err("its replica identity is unknown"),
        };
        let mut columns = Vec::new();
        for _ in 0..self.u16()? {
            columns.push(RelationColumn {
                is_key: self.u8()? & 1 != 0,
                name: self.string()?,
                type_oid: self.u32()?,
                type_modifier: self.i32()?,
            });
        }
        Ok(Message::Relation(Relation { xid, oid, namespace, name, replica_identity, columns }))
    }

    fn type_name(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let xid = self.xid(in_stream)?;
        Ok(Message::Type { xid, oid: self.u32()?, namespace: self.string()?, name: self.string()? })
    }

    fn insert(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let (xid, relation) = (self.xid(in_stream)?, self.u32()?);
        Ok(Message::Insert { xid, relation, new: self.new_tuple()? })
    }

    fn update(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let (xid, relation) = (self.xid(in_stream)?, self.u32()?);
        Ok(Message::Update { xid, relation, old: self.old_tuple()?, new: self.new_tuple()? })
    }

    fn delete(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let (xid, relation) = (self.xid(in_stream)?, self.u32()?);
        match self.old_tuple()? {
            OldTuple::None => Err("the old row is missing"),
            old => Ok(Message::Delete { xid, relation, old }),
        }
    }

    fn truncate(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let (xid, count, options) = (self.xid(in_stream)?, self.u32()?, self.u8()?);
        let mut relations = Vec::new();
        for _ in 0..count {
            relations.push(self.u32()?);
        }
        Ok(Message::Truncate { xid, cascade: options & 1 != 0, restart_identity: options & 2 != 0, relations })
    }

    fn logical(&mut self, in_stream: bool) -> Result<Message<'a>, Fault> {
        let (xid, transactional) = (self.xid(in_stream)?, self.u8()? & 1 != 0);
        let (lsn, prefix, content) = (self.u64()?, self.string()?, self.counted()?);
        Ok(Message::Logical { xid, transactional, lsn, prefix, content })
    }

    fn stream_commit(&mut self) -> Result<Message<'a>, Fault> {
        let xid = self.u32()?;
        self.no_flags()?;
        let (commit_lsn, end_lsn, commit_time) = (self.u64()?, self.u64()?, self.time()?);
        Ok(Message::StreamCommit { xid, commit_lsn, end_lsn, commit_time })
    }

    fn stream_abort(&mut self) -> Result<Message<'a>, Fault> {
        let (xid, sub_xid) = (self.u32()?, self.u32()?);
        let abort = if self.is_empty() { None } else { Some(Abort { lsn: self.u64()?, time: self.time()? }) };
        Ok(Message::StreamAbort { xid, sub_xid, abort })
    }

    fn xid(&mut self, in_stream: bool) -> Result<Option<u32>, Fault> {
        if in_stream { self.u32().map(Some) } else { Ok(None) }
    }

    /// Flags of a commit are unused, and what they would mean is unknown.
    fn no_flags(&mut self) -> Result<(), Fault> {
        if self.u8()? == 0 { Ok(()) } else { Err("it has unknown flags") }
    }

    fn time(&mut self) -> Result<Micros, Fault> {
        self.i64()?.checked_add(POSTGRES_EPOCH_MICROS).ok_or("its time is out of range")
    }

    fn new_tuple(&mut self) -> Result<Tuple<'a>, Fault> {
        if self.u8()? == b'N' { self.tuple() } else { Err("the new row is missing") }
    }

    fn old_tuple(&mut self) -> Result<OldTuple<'a>, Fault> {
        let mut ahead = *self;
        let old: fn(Tuple<'a>) -> OldTuple<'a> = match ahead.u8()? {
            b'K' => OldTuple::Key,
            b'O' => OldTuple::Full,
            _ => return Ok(OldTuple::None),
        };
        *self = ahead;
        Ok(old(self.tuple()?))
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, Fault> {
        let columns = self.u16()?;
        let values = self.rest();
        for _ in 0..columns {
            self.value()?;
        }
        Ok(Tuple { columns, values: &values[..values.len() - self.rest().len()] })
    }

    fn value(&mut self) -> Result<Value<'a>, Fault> {
        Ok(match self.u8()? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' => Value::Text(self.counted()?),
            b'b' => Value::Binary(self.counted()?),
            _ => return Err("a value in it is of an unknown kind"),
        })
    }
}
