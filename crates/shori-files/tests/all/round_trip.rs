//! What is written is read back, bit by bit: random changes over every carried type.

use std::sync::Arc;

use arrow::array::BinaryArray;
use arrow::datatypes::{DataType, Field, TimeUnit};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, SortKey, Watermark};
use shori_core::schema::TableSchema;
use shori_core::testing::value::{Row, Value, arrays_of};

use crate::harness::{Logs, Reader};

fn schema() -> Arc<TableSchema> {
    let time = TimeUnit::Microsecond;
    let types = [
        DataType::Int64,
        DataType::Boolean,
        DataType::Int16,
        DataType::Int32,
        DataType::Float32,
        DataType::Float64,
        DataType::Utf8,
        DataType::Binary,
        DataType::Date32,
        DataType::Time64(time),
        DataType::Timestamp(time, None),
        DataType::Timestamp(time, Some("UTC".into())),
        DataType::Decimal128(38, 0),
        DataType::Decimal128(18, 2),
        DataType::Decimal128(38, 38),
    ];
    let field =
        |(index, data_type): (usize, &DataType)| Field::new(format!("c\"{index}é"), data_type.clone(), index > 0);
    let fields = types.iter().enumerate().map(field).collect();
    Arc::new(TableSchema::new("all types", fields, &["c\"0é"]).unwrap())
}

fn integer(rng: &mut ChaCha8Rng, least: i64, most: i64) -> i64 {
    match rng.random_range(0..4) {
        0 => least,
        1 => most,
        2 => rng.random_range(-3..=3).clamp(least, most),
        _ => rng.random_range(least..=most),
    }
}

fn value(rng: &mut ChaCha8Rng, data_type: &DataType) -> Value {
    const DAY: i64 = 86_400_000_000;
    match data_type {
        DataType::Boolean => Value::Boolean(rng.random()),
        DataType::Int16 => Value::Integer(integer(rng, i16::MIN.into(), i16::MAX.into())),
        DataType::Int32 => Value::Integer(integer(rng, i32::MIN.into(), i32::MAX.into())),
        DataType::Int64 => Value::Integer(integer(rng, i64::MIN, i64::MAX)),
        DataType::Float32 => {
            let any = f32::from_bits(rng.random());
            let known = [0.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.1];
            let chosen = if any.is_nan() || rng.random_ratio(1, 3) { *known.choose(rng).unwrap() } else { any };
            Value::Float(f64::from(chosen).to_bits())
        }
        DataType::Float64 => {
            let any = f64::from_bits(rng.random());
            let known = [0.0, -0.0, 5e-324, f64::MAX, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.1, 1e23];
            Value::Float(
                if any.is_nan() || rng.random_ratio(1, 3) { *known.choose(rng).unwrap() } else { any }.to_bits(),
            )
        }
        DataType::Utf8 => {
            let letters = ['a', '"', '\\', '\n', '\u{0}', '\u{7f}', 'é', '\u{2028}', '🦀', '{', '/'];
            let text: String = (0..rng.random_range(0..12)).map(|_| *letters.choose(rng).unwrap()).collect();
            Value::from(text.as_str())
        }
        DataType::Binary => Value::Binary((0..rng.random_range(0..9)).map(|_| rng.random()).collect()),
        DataType::Date32 => Value::Time(integer(rng, i32::MIN.into(), i32::MAX.into())),
        DataType::Time64(_) => Value::Time(integer(rng, 0, DAY)),
        DataType::Timestamp(..) => Value::Time(integer(rng, i64::MIN, i64::MAX)),
        DataType::Decimal128(precision, _) => {
            let most = 10i128.pow((*precision).into()) - 1;
            Value::Decimal(match rng.random_range(0..3) {
                0 => most,
                1 => -most,
                _ => rng.random_range(-most..=most),
            })
        }
        other => panic!("{other:?}"),
    }
}

/// A run of changes, which go on at `next`.
fn batch(rng: &mut ChaCha8Rng, schema: &Arc<TableSchema>, next: &mut u64) -> ChangeBatch {
    let fields = schema.columns.fields();
    let (mut head, mut rows, mut masks) =
        (ChangeHeadBuilder::default(), Vec::<Row>::new(), Vec::<Option<Vec<u8>>>::new());
    for _ in 0..rng.random_range(0..40) {
        *next += rng.random_range(1..5);
        let op = Op::from_u8(rng.random_range(0..=5)).unwrap();
        let seq = if rng.random() { SortKey::EMPTY } else { SortKey::from_slice(&[rng.random(), 0, 255]).unwrap() };
        head.push(&Position::new(SortKey::from_u64(*next), seq), op, integer(rng, i64::MIN, i64::MAX));
        let is_partial = op != Op::Truncate && rng.random_ratio(1, 4);
        let marked: Vec<bool> = fields.iter().map(|_| is_partial && rng.random_ratio(1, 3)).collect();
        let cell = |(column, field): (usize, &Arc<Field>)| {
            let is_null = op == Op::Truncate || marked[column] || rng.random_ratio(1, 6);
            if is_null { Value::Null } else { value(rng, field.data_type()) }
        };
        rows.push(fields.iter().enumerate().map(cell).collect());
        let mut mask = vec![0u8; fields.len().div_ceil(8)];
        marked.iter().enumerate().filter(|(_, is)| **is).for_each(|(column, _)| mask[column / 8] |= 1 << (column % 8));
        masks.push(mask.iter().any(|byte| *byte != 0).then_some(mask));
    }
    let columns = arrays_of(fields, &rows);
    let mut batch = head.finish(CaptureId::new("shop", &schema.table), schema.clone(), columns).unwrap();
    if masks.iter().any(Option::is_some) {
        batch.unchanged = Some(masks.iter().map(Option::as_deref).collect::<BinaryArray>());
    }
    batch
}

#[tokio::test]
async fn random_changes_of_every_type_come_back() {
    for seed in 0..60 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let schema = schema();
        let logs = Logs::new(rng.random_range(1..30));
        let (mut next, mut written) = (0, Vec::new());
        let (mut source, mut reader) = (logs.source(&["all types"]), Reader::default());
        for round in 0..rng.random_range(1..5) {
            let batches: Vec<ChangeBatch> =
                (0..rng.random_range(0..4)).map(|_| batch(&mut rng, &schema, &mut next)).collect();
            next += 1;
            let end = Position::new(SortKey::from_u64(next), SortKey::EMPTY);
            let mark = Watermark { staged: end, boundary: end, boundary_time: integer(&mut rng, i64::MIN, i64::MAX) };
            logs.write(&schema, &batches, &mark, &[]);
            written.extend(batches);
            // Another reader goes on where the log stands, or the same one does.
            if round == 0 || rng.random() {
                source = logs.source(&["all types"]);
                reader.start(&mut source).await.unwrap();
            }
            reader.read(&mut source, rng.random_range(1..50)).await.unwrap();
            assert_eq!(reader.watermark.unwrap().boundary, end, "seed {seed}");
        }
        let whole = |batches: &[ChangeBatch]| {
            ChangeBatch::concat(batches)
                .unwrap()
                .map(|batch| batch.to_record_batch().unwrap())
                .filter(|all| all.num_rows() > 0)
        };
        let read = reader.changes.into_values().next().unwrap_or_default();
        assert_eq!(
            whole(&read).map(|all| all.columns().to_vec()),
            whole(&written).map(|all| all.columns().to_vec()),
            "seed {seed}"
        );
    }
}
