//! What a `sql` projection keeps from one output to the next: what its target holds.

use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Maintenance, Measures, Projection, SqlProjection};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::compute::{Place, target};
use super::layout::{LIVE, Layout, result_table};
use super::query::{self, Shape};
use super::session::Session;
use super::steps;
use crate::database::quote_text;

/// An output that was computed and not settled.
pub(super) struct Pending {
    pub place: Place,
    pub positions: Positions,
    pub replaces: bool,
}

/// Whether the projection's next output is derived from its last result.
pub(super) fn keeps_result(sql: &SqlProjection) -> bool {
    !matches!(sql.maintenance, Maintenance::ByEntity { measures: Measures::PerEntity, .. })
}

/// The checkpoint that the kept result belongs to. Where no result is kept, any checkpoint: that there is one tells that
/// the target was made by this very definition.
pub(super) fn settled(session: &Session, projection: &Projection) -> Result<Option<Positions>> {
    let stored = session.rows(
        &format!("select checkpoint from settled where projection = {}", quote_text(&projection.name)),
        |row| row.get::<_, String>(0),
    )?;
    stored.first().map(|text| decode(text)).transpose()
}

/// Makes what is kept agree with the target's checkpoint.
pub(super) fn settle(
    session: &Session,
    layout: &Layout,
    projection: &Projection,
    shape: Option<&Shape>,
    pending: Option<&Pending>,
    checkpoint: Option<&Positions>,
) -> Result<()> {
    let Derivation::Sql(sql) = &projection.derivation else { return Ok(()) };
    let Some(checkpoint) = checkpoint else { return forget(session, projection) };
    if let (Some(pending), Some(shape)) = (pending, shape)
        && pending.positions == *checkpoint
    {
        if !keeps_result(sql) && settled(session, projection)?.is_some() {
            return Ok(());
        }
        return session.transaction(|| {
            if keeps_result(sql) {
                take_over(session, projection, shape, pending)?;
            }
            failpoint::reached(failpoint::TRANSFORM_INSIDE_SETTLE);
            mark(session, projection, checkpoint)
        });
    }
    let settled = settled(session, projection)?;
    if settled.as_ref() == Some(checkpoint) || (settled.is_some() && !keeps_result(sql)) {
        return Ok(());
    }
    if !keeps_result(sql) {
        return mark(session, projection, checkpoint);
    }
    let applied = steps::applied(session, layout)?;
    if target(&layout.tables_of(projection)?, &applied).0 != *checkpoint {
        return forget(session, projection);
    }
    let rebuilt = session.transaction(|| {
        let create = format!("create or replace table {} as select * from {{query}}", result_table(&projection.name));
        query::run(session, sql, LIVE, &create)?;
        mark(session, projection, checkpoint)
    });
    match rebuilt {
        // The query fails now: whoever computes next will say so.
        Err(error) if error.kind() == ErrorKind::Projection => forget(session, projection),
        outcome => outcome,
    }
}

fn forget(session: &Session, projection: &Projection) -> Result<()> {
    session.run(&format!(
        "delete from settled where projection = {}; drop table if exists {}",
        quote_text(&projection.name),
        result_table(&projection.name)
    ))
}

fn take_over(session: &Session, projection: &Projection, shape: &Shape, pending: &Pending) -> Result<()> {
    let result = result_table(&projection.name);
    let rows = pending.place.rows();
    if pending.replaces {
        return session.run(&format!("create or replace table {result} as from {rows}"));
    }
    for changed in [&rows, &pending.place.keys()] {
        session.run(&format!("delete from {result} r using {changed} o where {}", shape.key_match("r", "o")))?;
    }
    session.run(&format!("insert into {result} by name from {rows}"))
}

fn mark(session: &Session, projection: &Projection, checkpoint: &Positions) -> Result<()> {
    let name = quote_text(&projection.name);
    session.run(&format!(
        "delete from settled where projection = {name}; insert into settled values ({name}, {}, {})",
        quote_text(&projection.definition()),
        quote_text(&encode(checkpoint))
    ))
}

/// A JSON list of source, instance, and lsn and seq in hexadecimal digits.
fn encode(positions: &Positions) -> String {
    let digits = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let list: Vec<_> = positions
        .iter()
        .map(|(id, at)| {
            [id.source.to_string(), id.instance.to_string(), digits(at.lsn.as_slice()), digits(at.seq.as_slice())]
        })
        .collect();
    serde_json::json!(list).to_string()
}

fn decode(text: &str) -> Result<Positions> {
    let corrupt = |cause: String| Error::new(ErrorKind::Corrupt, "read", "a checkpoint in the state cache", cause);
    let list: Vec<[String; 4]> = serde_json::from_str(text).map_err(|cause| corrupt(cause.to_string()))?;
    let bytes = |digits: &str| -> Result<Vec<u8>> {
        let pairs = (0..digits.len() / 2).map(|at| digits.get(2 * at..2 * at + 2));
        pairs
            .map(|pair| pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| corrupt(format!("{digits} is no position")))
    };
    list.iter()
        .map(|[source, instance, lsn, seq]| {
            Ok((CaptureId::new(source, instance), Position::from_slices(&bytes(lsn)?, &bytes(seq)?)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_come_back() {
        let at = |lsn: &[u8], seq: &[u8]| Position::from_slices(lsn, seq).unwrap();
        let positions = Positions::from([
            (CaptureId::new("a", "b/c"), at(&[1, 255], &[])),
            (CaptureId::new("a'", "\"d\""), at(&[], &[0, 16])),
        ]);
        assert_eq!(decode(&encode(&positions)).unwrap(), positions);
        assert!(decode("[[\"a\",\"b\",\"zz\",\"\"]]").is_err() && decode("{}").is_err());
    }
}
