//! Questions of people to a store: one reading statement each.
//!
//! What keeps a question from writing: it is [one statement that reads](Question), and its transaction is read only, so that
//! DuckDB refuses writes that hide inside. It may read files with the rights of the process: a question comes from who runs
//! the pipeline.
//!
//! An answer is handed out while it is made, in batches as DuckDB makes them, so it may have any number of rows. Who takes
//! it slowly holds up the statement alone; who goes away ends it.

use std::sync::{Arc, Mutex};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use duckdb::InterruptHandle;
use shori_core::{Error, ErrorKind, Result};
use tokio::sync::{mpsc, oneshot};

use super::question::Question;
use super::session::{Session, Sessions};
use crate::database::{duckdb_error, locked};

/// Rows that an answer given at once holds at most.
pub const ANSWER_ROWS_MAX: usize = 1_000_000;
/// Batches that wait for who takes them.
const BATCHES_WAITING: usize = 2;

/// An answer being given.
pub struct Answer {
    schema: SchemaRef,
    batches: mpsc::Receiver<Result<RecordBatch>>,
    _statement: Statement,
}

impl Answer {
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next rows. After an error there are none.
    pub async fn next(&mut self) -> Option<Result<RecordBatch>> {
        self.batches.recv().await
    }
}

/// Ends a statement that runs when nobody wants its rows any more.
struct Statement(Running);

/// What a running statement is ended by, as long as its connection stands.
type Running = Arc<Mutex<Option<Arc<InterruptHandle>>>>;

impl Drop for Statement {
    /// The connection serves no other statement afterwards, so none but this one is meant.
    fn drop(&mut self) {
        if let Some(handle) = &*locked(&self.0) {
            handle.interrupt();
        }
    }
}

/// A connection that can be interrupted from elsewhere. `duckdb` frees a connection before it lets go of its handle: an
/// interruption in between would reach into freed memory, so nobody may interrupt once closing has begun.
struct Interruptible {
    session: Session,
    running: Running,
}

impl Interruptible {
    fn new(session: Session) -> Self {
        let running = Arc::new(Mutex::new(Some(session.connection.interrupt_handle())));
        Self { session, running }
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        locked(&self.running).take();
    }
}

/// Begins to answer. The statement runs on, off the async threads, until all has been taken or the answer is dropped.
pub(super) async fn stream(sessions: &Arc<Sessions>, sql: &str) -> Result<Answer> {
    let sql = sql.to_string();
    let opening = sessions.clone();
    let asked = Interruptible::new(sessions.database.run(move || opening.session()).await?);
    let statement = Statement(asked.running.clone());
    let (begun, begins) = oneshot::channel();
    let (sender, batches) = mpsc::channel(BATCHES_WAITING);
    tokio::task::spawn_blocking(move || {
        let mut begun = Some(begun);
        let mut begin = |schema| begun.take().is_some_and(|begun| begun.send(Ok(schema)).is_ok());
        let answered = answer(&asked.session, &sql, &mut begin, &mut |batch| sender.blocking_send(Ok(batch)).is_ok());
        // Who has gone away does not want to know of a failure.
        match (answered, begun) {
            (Err(error), Some(begun)) => drop(begun.send(Err(error))),
            (Err(error), None) => drop(sender.blocking_send(Err(error))),
            (Ok(()), _) => {}
        }
    });
    let lost = |cause| Error::new(ErrorKind::Internal, "answer", "the question", cause);
    // It may take all of its time before it tells its columns.
    let schema = begins.await.map_err(lost)??;
    Ok(Answer { schema, batches, _statement: statement })
}

/// All of an answer, which must not have many rows. An empty one is one batch without rows.
pub(super) fn query(session: &Session, sql: &str) -> Result<Vec<RecordBatch>> {
    let (mut schema, mut batches, mut rows) = (None, Vec::new(), 0);
    let mut begin = |columns| {
        schema = Some(columns);
        true
    };
    answer(session, sql, &mut begin, &mut |batch| {
        rows += batch.num_rows();
        batches.push(batch);
        rows <= ANSWER_ROWS_MAX
    })?;
    if rows > ANSWER_ROWS_MAX {
        return Err(too_many());
    }
    if let (true, Some(schema)) = (batches.is_empty(), schema) {
        batches.push(RecordBatch::new_empty(schema));
    }
    Ok(batches)
}

/// Why an answer is not given at once.
pub fn too_many() -> Error {
    let cause = format!("it has more than {ANSWER_ROWS_MAX} rows");
    Error::new(ErrorKind::Usage, "answer", "the question", cause).with_remedy("add a limit")
}

/// Hands the answer to `take` until it wants no more, its columns to `begin` before.
fn answer(
    session: &Session,
    sql: &str,
    begin: &mut dyn FnMut(SchemaRef) -> bool,
    take: &mut dyn FnMut(RecordBatch) -> bool,
) -> Result<()> {
    let question = Question::read(sql, &mut |sql| told(session, sql))?;
    session.batch("begin transaction read only", "a question")?;
    let answered = run(session, &question.sql(), begin, take);
    session.roll_back();
    answered
}

/// The text that is the only value of an answer.
fn told(session: &Session, sql: &str) -> Result<String> {
    let rows = session.rows(sql, &[], "the question", |row| row.get(0))?;
    rows.into_iter().next().ok_or_else(|| Error::new(ErrorKind::Internal, "read", "the question", "no row came"))
}

fn run(
    session: &Session,
    sql: &str,
    begin: &mut dyn FnMut(SchemaRef) -> bool,
    take: &mut dyn FnMut(RecordBatch) -> bool,
) -> Result<()> {
    let fail = |cause| duckdb_error("answer", "the question", cause);
    let mut statement = session.connection.prepare(sql).map_err(fail)?;
    // What the stream is read by panics on an error; `step` returns it.
    let schema = statement.stream_arrow([]).map_err(fail)?.get_schema();
    if !begin(schema) {
        return Ok(());
    }
    while let Some(array) = statement.step().map_err(fail)? {
        if !take(RecordBatch::from(&array)) {
            return Ok(());
        }
    }
    Ok(())
}
