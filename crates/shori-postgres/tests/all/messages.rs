//! Messages of `pgoutput`: each decodes to what was written, and nothing else decodes.

use rand::Rng;
use shori_core::ErrorKind;
use shori_postgres::message::{
    Abort, Message, OldTuple, Relation, RelationColumn, ReplicaIdentity, Tuple, Value, decode,
};

use crate::bytes::{Bytes, random_bytes, seeded};

/// 2000-01-01 in microseconds since 1970-01-01.
const EPOCH: i64 = 946_684_800_000_000;

const XID: u32 = 0xfedc_ba98;

/// A row of a null, an unchanged, a text and a binary value.
fn row(bytes: Bytes) -> Bytes {
    bytes.u16(4).u8(b'n').u8(b'u').u8(b't').counted(b"12.30").u8(b'b').counted(&[0, 0, 0, 7])
}

fn values(tuple: Tuple<'_>) -> Vec<Value<'_>> {
    let values: Vec<_> = tuple.iter().collect();
    assert_eq!(values.len(), tuple.len());
    values
}

const ROW: [Value<'static>; 4] = [Value::Null, Value::Unchanged, Value::Text(b"12.30"), Value::Binary(&[0, 0, 0, 7])];

fn relation(xid: Option<u32>) -> Bytes {
    let head = Bytes::message(b'R').in_transaction(xid).u32(16_385).string("shop").string("orders").u8(b'd');
    let first = head.u16(2).u8(1).string("id").u32(20).i32(-1);
    first.u8(0).string("prix_ß").u32(1700).i32(1_179_654)
}

/// One of each message outside a streamed block (`xid` is none) or within one, with its name.
fn all(xid: Option<u32>) -> Vec<(&'static str, Bytes)> {
    let head = |tag: u8| Bytes::message(tag).in_transaction(xid);
    let change = |tag: u8| head(tag).u32(16_385);
    vec![
        ("Begin", Bytes::message(b'B').u64(0x16_b374_d848).i64(1).u32(XID)),
        ("Commit", Bytes::message(b'C').u8(0).u64(7).u64(8).i64(-1)),
        ("Origin", Bytes::message(b'O').u64(7).string("upstream")),
        ("Relation", relation(xid)),
        ("Type", head(b'Y').u32(90_000).string("").string("mood")),
        ("Insert", row(change(b'I').u8(b'N'))),
        ("Update", row(change(b'U').u8(b'N'))),
        ("Update", row(row(change(b'U').u8(b'K')).u8(b'N'))),
        ("Update", row(row(change(b'U').u8(b'O')).u8(b'N'))),
        ("Delete", row(change(b'D').u8(b'K'))),
        ("Delete", row(change(b'D').u8(b'O'))),
        ("Truncate", head(b'T').u32(2).u8(3).u32(16_385).u32(16_386)),
        ("Message", head(b'M').u8(1).u64(7).string("shori").counted(&[0, 255])),
        ("Stream Start", Bytes::message(b'S').u32(XID).u8(1)),
        ("Stream Stop", Bytes::message(b'E')),
        ("Stream Commit", Bytes::message(b'c').u32(XID).u8(0).u64(7).u64(8).i64(2)),
        ("Stream Abort", Bytes::message(b'A').u32(XID).u32(XID + 1)),
        ("Stream Abort", Bytes::message(b'A').u32(XID).u32(XID + 1).u64(9).i64(3)),
    ]
}

#[test]
fn a_transaction_begins_and_commits() {
    let begin = Bytes::message(b'B').u64(0x16_b374_d848).i64(1).u32(XID);
    let expected = Message::Begin { final_lsn: 0x16_b374_d848, commit_time: EPOCH + 1, xid: XID };
    assert_eq!(decode(&begin.0, false).unwrap(), expected);
    let commit = Bytes::message(b'C').u8(0).u64(7).u64(u64::MAX).i64(-EPOCH);
    let expected = Message::Commit { commit_lsn: 7, end_lsn: u64::MAX, commit_time: 0 };
    assert_eq!(decode(&commit.0, false).unwrap(), expected);
    let origin = Bytes::message(b'O').u64(7).string("upstream");
    assert_eq!(decode(&origin.0, false).unwrap(), Message::Origin { commit_lsn: 7, name: "upstream" });
}

#[test]
fn a_relation_and_a_type_are_described() {
    for xid in [None, Some(XID)] {
        let columns = vec![
            RelationColumn { is_key: true, name: "id", type_oid: 20, type_modifier: -1 },
            RelationColumn { is_key: false, name: "prix_ß", type_oid: 1700, type_modifier: 1_179_654 },
        ];
        let expected = Relation {
            xid,
            oid: 16_385,
            namespace: "shop",
            name: "orders",
            replica_identity: ReplicaIdentity::PrimaryKey,
            columns,
        };
        assert_eq!(decode(&relation(xid).0, xid.is_some()).unwrap(), Message::Relation(expected));
        let bytes = Bytes::message(b'Y').in_transaction(xid).u32(90_000).string("").string("mood");
        let expected = Message::Type { xid, oid: 90_000, namespace: "", name: "mood" };
        assert_eq!(decode(&bytes.0, xid.is_some()).unwrap(), expected);
    }
    for (letter, expected) in
        [(b'n', ReplicaIdentity::Nothing), (b'f', ReplicaIdentity::Full), (b'i', ReplicaIdentity::Index)]
    {
        let bytes = Bytes::message(b'R').u32(1).string("").string("t").u8(letter).u16(0);
        match decode(&bytes.0, false).unwrap() {
            Message::Relation(relation) => assert_eq!(relation.replica_identity, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn rows_come_with_their_changes() {
    for stream in [None, Some(XID)] {
        let change = |tag: u8| Bytes::message(tag).in_transaction(stream).u32(16_385);
        let bytes = row(change(b'I').u8(b'N'));
        match decode(&bytes.0, stream.is_some()).unwrap() {
            Message::Insert { xid, relation: 16_385, new } if xid == stream => {
                assert_eq!(values(new), ROW);
                assert_eq!((new.byte_len(), new.is_empty()), (1 + 1 + 10 + 9, false));
            }
            other => panic!("{other:?}"),
        }
        for tag in [None, Some(b'K'), Some(b'O')] {
            let head = change(b'U');
            let bytes = row(tag.map_or(head.clone(), |tag| row(head.u8(tag))).u8(b'N'));
            match decode(&bytes.0, stream.is_some()).unwrap() {
                Message::Update { xid, relation: 16_385, old, new } if xid == stream => {
                    assert_eq!(values(new), ROW);
                    assert_eq!(tag_of(&old), tag);
                    assert_eq!(old.tuple().map(values), tag.map(|_| ROW.to_vec()));
                }
                other => panic!("{other:?}"),
            }
        }
        for tag in [b'K', b'O'] {
            let bytes = row(change(b'D').u8(tag));
            match decode(&bytes.0, stream.is_some()).unwrap() {
                Message::Delete { xid, relation: 16_385, old } if xid == stream => {
                    assert_eq!(tag_of(&old), Some(tag));
                    assert_eq!(old.tuple().map(values), Some(ROW.to_vec()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

fn tag_of(old: &OldTuple<'_>) -> Option<u8> {
    match old {
        OldTuple::None => None,
        OldTuple::Key(_) => Some(b'K'),
        OldTuple::Full(_) => Some(b'O'),
    }
}

#[test]
fn truncations_and_messages_of_applications() {
    for xid in [None, Some(XID)] {
        for options in 0..4 {
            let bytes = Bytes::message(b'T').in_transaction(xid).u32(2).u8(options).u32(16_385).u32(16_386);
            let expected = Message::Truncate {
                xid,
                cascade: options & 1 == 1,
                restart_identity: options & 2 == 2,
                relations: vec![16_385, 16_386],
            };
            assert_eq!(decode(&bytes.0, xid.is_some()).unwrap(), expected);
        }
        for transactional in [false, true] {
            let head = Bytes::message(b'M').in_transaction(xid).u8(transactional.into());
            let bytes = head.u64(7).string("shori").counted(&[0, 255]);
            let expected = Message::Logical { xid, transactional, lsn: 7, prefix: "shori", content: &[0, 255] };
            assert_eq!(decode(&bytes.0, xid.is_some()).unwrap(), expected);
        }
    }
}

#[test]
fn streamed_transactions() {
    let start = |first| Bytes::message(b'S').u32(XID).u8(first);
    assert_eq!(decode(&start(1).0, false).unwrap(), Message::StreamStart { xid: XID, is_first: true });
    assert_eq!(decode(&start(0).0, false).unwrap(), Message::StreamStart { xid: XID, is_first: false });
    assert_eq!(decode(b"E", true).unwrap(), Message::StreamStop);
    let commit = Bytes::message(b'c').u32(XID).u8(0).u64(7).u64(8).i64(2);
    let expected = Message::StreamCommit { xid: XID, commit_lsn: 7, end_lsn: 8, commit_time: EPOCH + 2 };
    assert_eq!(decode(&commit.0, false).unwrap(), expected);
    let abort = Bytes::message(b'A').u32(XID).u32(5);
    assert_eq!(decode(&abort.0, false).unwrap(), Message::StreamAbort { xid: XID, sub_xid: 5, abort: None });
    let abort = abort.u64(9).i64(3);
    let expected = Message::StreamAbort { xid: XID, sub_xid: 5, abort: Some(Abort { lsn: 9, time: EPOCH + 3 }) };
    assert_eq!(decode(&abort.0, false).unwrap(), expected);
}

#[test]
fn a_message_cut_anywhere_or_too_long_is_refused_by_name() {
    for xid in [None, Some(XID)] {
        for (name, Bytes(bytes)) in all(xid) {
            decode(&bytes, xid.is_some()).unwrap();
            for length in 1..bytes.len() {
                // An abort may end before its place and time.
                if bytes[0] == b'A' && length == 9 {
                    continue;
                }
                let error = decode(&bytes[..length], xid.is_some()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Data);
                assert!(error.to_string().contains(&format!("a {name} message")), "{error}");
            }
            let longer = Bytes(bytes).u8(0).0;
            let error = decode(&longer, xid.is_some()).unwrap_err();
            assert!(error.to_string().contains(&format!("a {name} message")), "{error}");
        }
    }
    assert_eq!(decode(&[], false).unwrap_err().kind(), ErrorKind::Data);
}

#[test]
fn what_no_server_sends_is_refused() {
    let change = |tag: u8| Bytes::message(tag).u32(1);
    let cases = [
        Bytes::message(b'z'),
        Bytes::message(0),
        // Prepared transactions are not asked for.
        Bytes::message(b'P').u8(0).u64(1).u64(2).i64(3).u32(4).string("gid"),
        Bytes::message(b'C').u8(1).u64(7).u64(8).i64(0),
        Bytes::message(b'c').u32(XID).u8(1).u64(7).u64(8).i64(0),
        Bytes::message(b'C').u8(0).u64(7).u64(8).i64(i64::MAX),
        Bytes::message(b'R').u32(1).string("").string("t").u8(b'x').u16(0),
        Bytes::message(b'O').u64(7).raw(b"\xff\0"),
        change(b'I').u8(b'O').u16(0),
        change(b'U').u8(b'K').u16(0),
        change(b'U').u8(b'K').u16(0).u8(b'K').u16(0),
        change(b'D').u8(b'N').u16(0),
        change(b'I').u8(b'N').u16(1).u8(b'x'),
        change(b'I').u8(b'N').u16(1).u8(b't').i32(-1),
        change(b'I').u8(b'N').u16(1).u8(b'b').i32(i32::MIN),
        // Lengths and counts that the bytes do not bear out: nothing is set aside for them.
        change(b'I').u8(b'N').u16(1).u8(b't').i32(i32::MAX),
        change(b'I').u8(b'N').u16(u16::MAX),
        Bytes::message(b'T').u32(u32::MAX).u8(0).u32(1),
        Bytes::message(b'R').u32(1).string("").string("t").u8(b'd').u16(u16::MAX),
        Bytes::message(b'M').u8(0).u64(7).string("").i32(i32::MAX),
    ];
    for Bytes(bytes) in cases {
        let error = decode(&bytes, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data, "{bytes:?}");
    }
    assert!(decode(b"z", false).unwrap_err().to_string().contains("0x7a"));
}

/// Whatever decodes can be read to its end.
fn read_all(bytes: &[u8], in_stream: bool) {
    let Ok(message) = decode(bytes, in_stream) else { return };
    let (old, new) = match message {
        Message::Insert { new, .. } => (OldTuple::None, Some(new)),
        Message::Update { old, new, .. } => (old, Some(new)),
        Message::Delete { old, .. } => (old, None),
        _ => return,
    };
    for tuple in old.tuple().into_iter().chain(new) {
        assert_eq!(tuple.iter().count(), tuple.len());
    }
}

#[test]
fn random_bytes_never_panic() {
    const TAGS: &[u8] = b"BCORYIUDTMSEcA";
    let mut rng = seeded(0x5eed_0001);
    for _ in 0..300_000 {
        let mut bytes = random_bytes(&mut rng, 60);
        if rng.random_bool(0.9) {
            bytes.insert(0, TAGS[rng.random_range(0..TAGS.len())]);
        }
        let in_stream = rng.random();
        read_all(&bytes, in_stream);
    }
}

#[test]
fn damaged_messages_never_panic() {
    let mut rng = seeded(0x5eed_0002);
    let messages: Vec<_> = [None, Some(XID)].into_iter().flat_map(all).collect();
    for _ in 0..300_000 {
        let mut bytes = messages[rng.random_range(0..messages.len())].1.0.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = if rng.random() { rng.random() } else { b"KONntub\0\xff"[rng.random_range(0..9)] };
        }
        let in_stream = rng.random();
        read_all(&bytes, in_stream);
    }
}
