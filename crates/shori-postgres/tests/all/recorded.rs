//! What a PostgreSQL 15 server wrote: values by the output and send functions of their types, and a slot's changes.
//!
//! `values.txt` holds type, text and binary value in hexadecimal, with tabs between; a type after `refused` cannot hold
//! the value. `messages_text.txt` and `messages_binary.txt` hold one message a line, of the same transactions: changes of
//! `orders` and `full_rows`, the last transaction streamed. Of changes of one kind in a row, two are kept.

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Decimal128Type, Int64Type};
use shori_postgres::column_types::{Kind, PostgresType};
use shori_postgres::message::{Message, OldTuple, Tuple, Value, decode};

use crate::columns::{agreed, builder, column, numeric, refused};

const VALUES: &str = include_str!("recorded/values.txt");
const MESSAGES: [&str; 2] = [include_str!("recorded/messages_text.txt"), include_str!("recorded/messages_binary.txt")];

fn from_hexadecimal(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn type_named(name: &str) -> PostgresType {
    if let Some((precision, scale)) = name.strip_prefix("numeric(").and_then(|rest| rest.split_once(',')) {
        return numeric(precision.parse().unwrap(), scale.trim_end_matches(')').parse().unwrap());
    }
    column(match name.split('(').next().unwrap() {
        "boolean" => 16,
        "bytea" => 17,
        "\"char\"" => 18,
        "name" => 19,
        "bigint" => 20,
        "smallint" => 21,
        "integer" => 23,
        "text" => 25,
        "oid" => 26,
        "json" => 114,
        "xml" => 142,
        "real" => 700,
        "double precision" => 701,
        "char" => 1042,
        "varchar" => 1043,
        "date" => 1082,
        "time" => 1083,
        "timestamp" => 1114,
        "timestamptz" => 1184,
        "uuid" => 2950,
        "jsonb" => 3802,
        "mood" => return PostgresType { oid: 90_000, modifier: -1, kind: Kind::Enum, name: name.into() },
        other => panic!("{other}"),
    })
}

#[test]
fn values_are_the_same_in_both_formats() {
    for line in VALUES.lines() {
        let [name, text, binary] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        let binary = from_hexadecimal(binary);
        match name.strip_prefix("refused ") {
            Some(name) => refused(&type_named(name), text, &binary),
            None => {
                let array = agreed(&type_named(name), text, &binary);
                if *array.data_type() == DataType::Utf8 {
                    assert_eq!(array.as_string::<i32>().value(0), text);
                }
            }
        }
    }
}

/// A message where the ones before it have led, in or out of a streamed block.
fn follow<'a>(bytes: &'a [u8], in_stream: &mut bool) -> Message<'a> {
    let message = decode(bytes, *in_stream).unwrap();
    match message {
        Message::StreamStart { .. } => *in_stream = true,
        Message::StreamStop => *in_stream = false,
        _ => {}
    }
    message
}

/// Ids and prices of a row of `orders`.
fn order(tuple: Tuple<'_>) -> (i64, i128) {
    let values: Vec<_> = tuple.iter().collect();
    let (mut ids, mut prices) = (builder(&column(20), false), builder(&numeric(18, 2), false));
    ids.append(values[0]).unwrap();
    prices.append(values[2]).unwrap();
    (ids.finish().as_primitive::<Int64Type>().value(0), prices.finish().as_primitive::<Decimal128Type>().value(0))
}

#[test]
fn changes_of_a_slot_are_told_in_both_formats() {
    for recorded in MESSAGES {
        let lines: Vec<_> = recorded.lines().map(from_hexadecimal).collect();
        let mut in_stream = false;
        let messages: Vec<_> = lines.iter().map(|bytes| follow(bytes, &mut in_stream)).collect();
        assert!(!in_stream);
        let Message::Relation(orders) = &messages[2] else { panic!("{:?}", messages[2]) };
        let columns: Vec<_> = orders.columns.iter().map(|column| (column.name, column.is_key)).collect();
        assert_eq!((orders.namespace, orders.name), ("public", "orders"));
        assert_eq!(columns, [("id", true), ("state", false), ("price", false), ("note", false)]);
        let is_orders = |relation: u32| relation == orders.oid;

        let committed = messages.iter().filter_map(|message| match message {
            Message::Insert { xid: None, relation, new } if is_orders(*relation) => Some(order(*new)),
            _ => None,
        });
        assert_eq!(committed.collect::<Vec<_>>(), [(1, 1230), (2, -5)]);

        let updates = messages.iter().filter_map(|message| match message {
            Message::Update { old, new, .. } => Some((*old, new.iter().last())),
            _ => None,
        });
        let [(OldTuple::None, unchanged), (OldTuple::Key(key), _), (OldTuple::Full(row), _)] =
            updates.collect::<Vec<_>>()[..]
        else {
            panic!("an update has another old row")
        };
        assert_eq!(unchanged, Some(Value::Unchanged));
        assert_eq!((key.iter().filter(|value| *value != Value::Null).count(), row.len()), (1, 2));
        check_boundaries(&messages);
    }
}

/// Every transaction ends where its beginning says, later than the one before; the streamed one has an aborted part.
fn check_boundaries(messages: &[Message<'_>]) {
    let (mut begun, mut ended, mut streamed, mut aborted) = (None, 0, None, None);
    for message in messages {
        match message {
            Message::Begin { final_lsn, commit_time, .. } => begun = Some((*final_lsn, *commit_time)),
            Message::Commit { commit_lsn, end_lsn, commit_time } => {
                assert_eq!(begun.take(), Some((*commit_lsn, *commit_time)));
                assert!(ended <= *commit_lsn && commit_lsn < end_lsn);
                ended = *end_lsn;
            }
            Message::StreamStart { xid, is_first } => {
                assert_eq!(*is_first, streamed.is_none());
                streamed = Some(*xid);
            }
            Message::StreamAbort { xid, sub_xid, abort: None } if xid != sub_xid => aborted = Some(*sub_xid),
            Message::StreamCommit { xid, commit_lsn, .. } => {
                assert_eq!(streamed, Some(*xid));
                assert!(ended <= *commit_lsn);
            }
            _ => {}
        }
    }
    assert!(begun.is_none() && streamed.is_some() && aborted.is_some());
}
