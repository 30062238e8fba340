//! The triggers of a captured table.
//!
//! A trigger logs what the table holds under the key once the trigger runs, not what `new` says: when another trigger
//! has changed the row again meanwhile, both log the row as it is, and the newest change row is the truth whatever order
//! they ran in. A key that the table no longer holds is logged as deleted.
//!
//! Before images are what `old` says: a deletion's row is one, and an update logs one directly before the row that it
//! left. A row that `or replace` puts another of the same key in place of has none.
//!
//! `or replace` evicts rows without firing their delete triggers. A row of the same key needs nothing: the new one takes
//! its place. A row of another key can only be evicted through another unique index (or a collation under which two
//! spellings of the key are one, or the hidden rowid). Tables that have one get BEFORE triggers, which set aside every
//! row that the new one conflicts with; the AFTER trigger logs those that are gone as deleted, first. Rows set aside by a
//! statement that evicted nothing (ignored, or an upsert) still stand in the table, which is how they are told apart. The
//! newest few of those are kept: a trigger of the user's may write to the table between our BEFORE and the eviction.
//!
//! The tables written here have no constraint that could fail: inside triggers, the conflict clause of the user's
//! statement would decide what happens then.

use crate::connection::quote_name;
use crate::install::BEFORE;
use crate::table::{Table, Term, TermValue, Unique};

/// `create trigger` statements for `table`, captured under `number`, whose column `i` is kept in slot `slots[i]`.
pub(crate) fn statements(table: &Table, number: i64, slots: &[usize]) -> Vec<(String, String)> {
    let writer = Writer { table, number, slots, conflict: conflict(table) };
    let mut triggers = Vec::with_capacity(5);
    let mut add = |when: &str, event: &str, body: String| {
        let name = trigger_name(number, &format!("{when}_{event}"));
        let (quoted, on) = (quote_name(&name), table.quoted());
        // In capitals as SQLite stores it, so that the stored text can be compared.
        triggers.push((name, format!("CREATE TRIGGER {quoted} {when} {event} on {on} begin\n{body}end")));
    };
    if writer.conflict.is_some() {
        add("before", "insert", writer.before_insert());
        add("before", "update", writer.before_update());
    }
    add("after", "insert", writer.after_insert());
    add("after", "update", writer.after_update());
    add("after", "delete", writer.after_delete());
    triggers
}

pub(crate) fn trigger_name(number: i64, suffix: &str) -> String {
    format!("_shori_{number}_{suffix}")
}

/// Microseconds since 1970 of the running statement, as far as SQLite's clock goes: whole milliseconds.
pub(crate) const NOW: &str = "cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer) * 1000";

/// Rows kept aside though they still stand in a table: as many as statements that are under way may yet evict, beside
/// their own.
const SET_ASIDE_MAX: u32 = 16;

struct Writer<'a> {
    table: &'a Table,
    number: i64,
    slots: &'a [usize],
    /// Whether a row of the table conflicts with `new` in any other way than by key.
    conflict: Option<String>,
}

impl Writer<'_> {
    fn before_insert(&self) -> String {
        // Before the insert, a rowid that SQLite is yet to choose reads as -1.
        let undecided = match self.table.key.first() {
            Some(key) if self.table.key_is_rowid => format!(" or {} = -1", self.column("new", key.column)),
            _ => String::new(),
        };
        let other_key = format!("(({}) is not true{undecided})", self.same_key(&self.table.quoted(), "new"));
        self.set_aside(&other_key)
    }

    fn before_update(&self) -> String {
        let other_row = format!("({}) is not true", self.same_key(&self.table.quoted(), "old"));
        self.set_aside(&other_row)
    }

    fn set_aside(&self, which: &str) -> String {
        let (number, table, slots) = (self.number, self.table.quoted(), self.slot_names(""));
        let values = self.values(&table);
        let conflict = self.conflict.as_deref().unwrap_or("false");
        let key = self.slot_key("_shori_evicted");
        let (same_key, still_there) = (self.key_equals(&table, &key), self.exists(&key));
        format!(
            "delete from _shori_evicted where capture = {number} and {still_there}\n\
             \x20 and rowid <= (select max(rowid) from _shori_evicted) - {SET_ASIDE_MAX};\n\
             delete from _shori_evicted where capture = {number}\n\
             \x20 and exists (select 1 from {table} where {same_key} and ({conflict}));\n\
             insert into _shori_evicted (capture{slots}) select {number}{values} from {table}\n\
             \x20 where ({conflict}) and {which}{};\n",
            self.key_not_null(&table)
        )
    }

    fn log_evicted(&self) -> String {
        if self.conflict.is_none() {
            return String::new();
        }
        let (number, slots, values) = (self.number, self.slot_names(""), self.slot_names("_shori_evicted."));
        let still_there = self.exists(&self.slot_key("_shori_evicted"));
        format!(
            "insert into _shori_changes (capture, op, at_us{slots}) select {number}, 1, {NOW}{values}\n\
             \x20 from _shori_evicted where capture = {number} and not {still_there};\n\
             delete from _shori_evicted where capture = {number} and not {still_there};\n"
        )
    }

    fn after_insert(&self) -> String {
        format!("{}{}", self.log_evicted(), self.log_row(2))
    }

    fn after_update(&self) -> String {
        let key_changed = (self.table.key.iter())
            .map(|key| {
                let (old, new) = (self.column("old", key.column), self.column("new", key.column));
                format!("{old} collate binary is not {new}")
            })
            .collect::<Vec<_>>()
            .join(" or ");
        format!("{}{}{}{}", self.forget(), self.log_evicted(), self.log_before(&key_changed), self.log_row(4))
    }

    fn after_delete(&self) -> String {
        format!("{}{}", self.forget(), self.log_deleted())
    }

    /// The row `old` is not evicted but logged otherwise. (With recursive_triggers on, evicted rows do fire the DELETE
    /// trigger.)
    fn forget(&self) -> String {
        if self.conflict.is_none() {
            return String::new();
        }
        let key = self.slot_key("_shori_evicted");
        let same = key.iter().zip(&self.table.key);
        let same: Vec<String> =
            same.map(|(slot, key)| format!("{slot} is {}", self.column("old", key.column))).collect();
        format!("delete from _shori_evicted where capture = {} and {};\n", self.number, same.join(" and "))
    }

    /// Logs the row that the table now holds under the key of `new`; one without a key as `new` has it.
    fn log_row(&self, op: u8) -> String {
        let (number, table, slots) = (self.number, self.table.quoted(), self.slot_names(""));
        let into = format!("insert into _shori_changes (capture, op, at_us{slots}) select {number}, {op}, {NOW}");
        let same_key = self.same_key(&table, "new");
        let mut text = format!("{into}{} from {table} where {same_key};\n", self.values(&table));
        let nullable = self.table.key.iter().filter(|key| key.nullable);
        let null: Vec<String> = nullable.map(|key| format!("{} is null", self.column("new", key.column))).collect();
        if !null.is_empty() {
            text.push_str(&format!("{into}{} where {};\n", self.values("new"), null.join(" or ")));
        }
        text
    }

    /// Logs the row `old`, which says by its `op` whether its key is gone.
    fn log_before(&self, key_changed: &str) -> String {
        let (number, slots) = (self.number, self.slot_names(""));
        format!(
            "insert into _shori_changes (capture, op, at_us{slots})\n\
             \x20 select {number}, case when ({key_changed}) and {} then 3 else {BEFORE} end, {NOW}{};\n",
            self.old_is_gone(),
            self.values("old")
        )
    }

    fn log_deleted(&self) -> String {
        let (number, slots) = (self.number, self.slot_names(""));
        format!(
            "insert into _shori_changes (capture, op, at_us{slots}) select {number}, 1, {NOW}{}\n\
             \x20 where {};\n",
            self.values("old"),
            self.old_is_gone()
        )
    }

    /// Whether the table holds no row under the key of `old`, which is one.
    fn old_is_gone(&self) -> String {
        let key: Vec<String> = self.table.key.iter().map(|key| self.column("old", key.column)).collect();
        format!("not {}{}", self.exists(&key), self.key_not_null("old"))
    }

    fn column(&self, row: &str, column: usize) -> String {
        format!("{row}.{}", quote_name(&self.table.columns[column].name))
    }

    fn values(&self, row: &str) -> String {
        (0..self.slots.len()).map(|column| format!(", {}", self.column(row, column))).collect()
    }

    fn slot_names(&self, prefix: &str) -> String {
        self.slots.iter().map(|slot| format!(", {prefix}v{slot}")).collect()
    }

    fn slot_key(&self, row: &str) -> Vec<String> {
        self.table.key.iter().map(|key| format!("{row}.v{}", self.slots[key.column])).collect()
    }

    fn same_key(&self, left: &str, right: &str) -> String {
        let right: Vec<String> = self.table.key.iter().map(|key| self.column(right, key.column)).collect();
        self.key_equals(left, &right)
    }

    /// Whether the row `left` of the table has exactly these key values. The first comparison is the index's own, so
    /// that it is used; under another collation than BINARY, a second one tells spellings apart.
    fn key_equals(&self, left: &str, right: &[String]) -> String {
        let mut conditions = Vec::with_capacity(right.len());
        for (key, right) in self.table.key.iter().zip(right) {
            let left = self.column(left, key.column);
            if self.table.key_is_rowid {
                conditions.push(format!("{left} = {right}"));
            } else if self.table.key_is_binary(key) {
                conditions.push(format!("{left} collate binary = {right}"));
            } else {
                conditions.push(format!("{left} collate {} = {right}", quote_name(&key.collation)));
                conditions.push(format!("{left} collate binary = {right}"));
            }
        }
        conditions.join(" and ")
    }

    fn exists(&self, key: &[String]) -> String {
        let table = self.table.quoted();
        format!("exists (select 1 from {table} where {})", self.key_equals(&table, key))
    }

    fn key_not_null(&self, row: &str) -> String {
        let nullable = self.table.key.iter().filter(|key| key.nullable);
        nullable.map(|key| format!(" and {} is not null", self.column(row, key.column))).collect()
    }
}

/// The condition under which a row of the table stands in the way of `new`, other than by key.
fn conflict(table: &Table) -> Option<String> {
    let mut ways: Vec<String> = table.uniques.iter().map(|unique| conflict_in(table, unique)).collect();
    if let Some(rowid) = table.rowid {
        ways.push(format!("({}.{rowid} = new.{rowid})", table.quoted()));
    }
    (!ways.is_empty()).then(|| ways.join(" or "))
}

fn conflict_in(table: &Table, unique: &Unique) -> String {
    let mut conditions: Vec<String> = unique.terms.iter().map(|term| same_term(table, term)).collect();
    conditions.extend(unique.filter.as_ref().map(|filter| format!("({filter})")));
    format!("({})", conditions.join(" and "))
}

fn same_term(table: &Table, term: &Term) -> String {
    let collation = quote_name(&term.collation);
    match &term.value {
        TermValue::Column(column) => {
            let name = quote_name(&table.columns[*column].name);
            format!("{}.{name} collate {collation} = {}", table.quoted(), new_value(table, *column))
        }
        TermValue::Expression(text) => {
            // The same expression, over a table of the same name that holds only the new row.
            let columns = (0..table.columns.len())
                .map(|column| format!("{} as {}", new_value(table, column), quote_name(&table.columns[column].name)))
                .collect::<Vec<_>>()
                .join(", ");
            let new = format!("(select {text} from (select {columns}) as {})", table.quoted());
            format!("({text}) collate {collation} = {new}")
        }
    }
}

fn new_value(table: &Table, column: usize) -> String {
    let name = quote_name(&table.columns[column].name);
    match &table.columns[column].default_for_null {
        Some(default) => format!("ifnull(new.{name}, ({default}))"),
        None => format!("new.{name}"),
    }
}
