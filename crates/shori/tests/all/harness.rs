//! Runs the program in a folder of its own, and looks at what it serves.
//!
//! Whatever is waited for has a deadline; nothing is waited for by time alone.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use rustix::process::{Pid, Signal, kill_process};
use shori::control::Client;
use tempfile::TempDir;

/// What is not there by then never comes: far more than a busy machine needs.
const DEADLINE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Rows of text.
pub type Rows = Vec<Vec<Option<String>>>;

/// A pipeline's folder.
pub struct World {
    pub folder: TempDir,
    which: [String; 2],
    projections: usize,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Done {
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

/// A program that runs; killed when dropped.
pub struct Running {
    child: Child,
    err: PathBuf,
    out: PathBuf,
}

/// Looks until something is found.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

impl World {
    /// The demo pipeline, with its sample tables and no rows.
    pub fn demo() -> Self {
        let world = Self::empty_demo();
        world.succeed(&["init", "--sample"]);
        world
    }

    /// The demo pipeline without a source.
    pub fn empty_demo() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let which = ["--dir".to_string(), folder.path().display().to_string()];
        Self { folder, which, projections: 4 }
    }

    /// A pipeline of one's own: shori.toml, files beside it, and what stands in source.db before capture.
    pub fn configured(configuration: &str, files: &[(&str, &str)], source: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("shori.toml");
        let which = ["-c".to_string(), file.display().to_string()];
        let mut world = Self { folder, which, projections: 0 };
        world.configure(configuration);
        for (name, text) in files {
            world.put(name, text);
        }
        rusqlite::Connection::open(world.path("source.db")).unwrap().execute_batch(source).unwrap();
        world
    }

    pub fn configure(&mut self, configuration: &str) {
        self.put("shori.toml", configuration);
        self.projections = configuration.matches("[[projection]]").count();
    }

    pub fn put(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A connection to the source, as another process would have it.
    pub fn source(&self) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(self.path("source.db")).unwrap();
        connection.busy_timeout(DEADLINE).unwrap();
        connection
    }

    #[track_caller]
    pub fn write(&self, statements: &str) {
        self.source().execute_batch(statements).unwrap();
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shori"));
        command.arg(words[0]).args(&self.which).args(&words[1..]).current_dir(self.folder.path());
        for name in ["LOG_LEVEL", "SHORI_FAILPOINT", "SHORI_KEEP_HOURS", "SHORI_SOURCE", "SHORI_SERVING"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs to the end.
    #[track_caller]
    pub fn shori(&self, words: &[&str]) -> Done {
        run(self.command(words))
    }

    #[track_caller]
    pub fn succeed(&self, words: &[&str]) -> Done {
        let done = self.shori(words);
        assert_eq!(done.status, Some(0), "shori {}: {done:?}", words.join(" "));
        done
    }

    pub fn start(&self, words: &[&str]) -> Running {
        Running::start(self.command(words))
    }

    /// Like `shori run`, returning when it can be reached.
    #[track_caller]
    pub fn run(&self) -> Running {
        self.reached(self.start(&["run"]))
    }

    #[track_caller]
    pub fn reached(&self, mut running: Running) -> Running {
        until("the socket", || {
            running.assert_running();
            self.client()
        });
        running
    }

    pub fn client(&self) -> Option<Client> {
        Client::connect(&self.path(".shori"))
    }

    /// Rows of the serving store as text: through the running pipeline, else from the file.
    pub fn try_query(&self, sql: &str) -> Result<Rows, String> {
        let sql = format!("select columns(*)::varchar from ({sql}) as q");
        let batches = match self.client() {
            Some(client) => client.query("serving", &sql).map_err(|error| error.to_string())?,
            None => {
                let file = duckdb::Connection::open(self.path("serving.duckdb")).map_err(|error| error.to_string())?;
                let mut statement = file.prepare(&sql).map_err(|error| error.to_string())?;
                statement.query_arrow([]).map_err(|error| error.to_string())?.collect()
            }
        };
        let text = |batch: &arrow::array::RecordBatch, row: usize| {
            let texts = batch.columns().iter().map(|column| column.as_string::<i32>().iter().nth(row).flatten());
            texts.map(|text| text.map(String::from)).collect()
        };
        Ok(batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|row| text(batch, row))).collect())
    }

    #[track_caller]
    pub fn query(&self, sql: &str) -> Rows {
        self.try_query(sql).unwrap()
    }

    /// The one value of a query; empty for null.
    #[track_caller]
    pub fn value(&self, sql: &str) -> String {
        self.query(sql)[0][0].clone().unwrap_or_default()
    }

    /// Opens the serving file for damage; nothing may run.
    pub fn serving(&self) -> duckdb::Connection {
        duckdb::Connection::open(self.path("serving.duckdb")).unwrap()
    }

    /// Runs a statement on the tables of a target, whatever their form: `TARGET` in it stands for one, then the other.
    pub fn damage(&self, target: &str, statement: &str) {
        damage(&self.serving(), target, statement);
    }

    /// The newest change that capture has logged, by id.
    pub fn newest_change(&self) -> i64 {
        let source = self.source();
        if !source.table_exists(None, "_shori_changes").unwrap() {
            return 0;
        }
        source.query_row("select ifnull(max(id), 0) from _shori_changes", [], |row| row.get(0)).unwrap()
    }

    /// Waits until every projection shows everything that the source holds now.
    #[track_caller]
    pub fn catch_up(&self, running: &mut Running) {
        until("capture", || {
            running.assert_running();
            let known = self.try_query("select count(*) from ctl_ingestion_watermarks").ok()?;
            (known[0][0].as_deref() != Some("0")).then_some(())
        });
        let newest = self.newest_change();
        let shown = format!(
            "select
                count(*) filter (status = 'OK' and coalesce(as_of_lsn, ''::blob) >= unhex('{newest:016x}')),
                string_agg(projection_name || ' ' || status || ' ' || coalesce(last_error, ''), ', ')
            from ctl_projection_metadata"
        );
        let mut last = None;
        let begun = Instant::now();
        while begun.elapsed() < DEADLINE {
            running.assert_running();
            match self.try_query(&shown) {
                Ok(rows) if rows[0][0].as_deref() == Some(&self.projections.to_string()) => return,
                Ok(rows) => last = rows[0][1].clone(),
                Err(error) => last = Some(error),
            }
            std::thread::sleep(LOOK_EVERY);
        }
        panic!("not all of {} projections show change {newest}: {last:?}\n{}", self.projections, running.err());
    }

    /// What is served is what the source calls for.
    #[track_caller]
    pub fn verify(&self) {
        let done = self.shori(&["verify"]);
        assert_eq!(done.status, Some(0), "{}\n{}", done.out, done.err);
        assert_eq!(done.out.matches(" ok\n").count(), self.projections, "{}", done.out);
    }

    /// Statuses of all runs, oldest first.
    pub fn runs(&self) -> Vec<String> {
        let rows = self.query("select status from pipeline_metadata order by start_time");
        rows.into_iter().map(|row| row[0].clone().unwrap()).collect()
    }
}

/// Runs a command to its end.
#[track_caller]
pub fn run(command: Command) -> Done {
    Running::start(command).end()
}

impl Done {
    /// Failed with `status` and one line that tells all of `parts`.
    #[track_caller]
    pub fn tells(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, Some(status), "{self:?}");
        let lines: Vec<&str> = self.err.lines().filter(|line| !line.contains("WARN trying again")).collect();
        assert_eq!(lines.len(), 1, "one line:\n{}", self.err);
        assert!(lines[0].starts_with("error: "), "{}", self.err);
        for part in parts {
            assert!(lines[0].contains(part), "{part:?} is not in: {}", self.err);
        }
        assert!(!self.err.contains("Stack Trace") && !self.err.contains("panicked"), "{}", self.err);
    }

    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.out.lines().count(), 1, "one line: {self:?}");
        serde_json::from_str(&self.out).unwrap()
    }
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let file = || tempfile::NamedTempFile::new().unwrap().into_temp_path().keep().unwrap();
        let (out, err) = (file(), file());
        let open = |path: &Path| Stdio::from(std::fs::File::create(path).unwrap());
        let child = command.stdin(Stdio::null()).stdout(open(&out)).stderr(open(&err)).spawn().unwrap();
        Self { child, err, out }
    }

    pub fn err(&self) -> String {
        std::fs::read_to_string(&self.err).unwrap_or_default()
    }

    pub fn out(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("it ended with {status}: {}", self.err());
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        until("the end of a program", || self.child.try_wait().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap(), signal).unwrap();
    }

    /// SIGTERM; it must end well.
    #[track_caller]
    pub fn stop(mut self) -> Done {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{status}: {}", self.err());
        Done { status: status.code(), out: self.out(), err: self.err() }
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the end that it comes to by itself.
    #[track_caller]
    pub fn end(mut self) -> Done {
        let status = self.wait();
        Done { status: status.code(), out: self.out(), err: self.err() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already, as a rule.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.err);
        let _ = std::fs::remove_file(&self.out);
    }
}

/// As [`World::damage`], in any store's file.
pub fn damage(store: &duckdb::Connection, target: &str, statement: &str) {
    let tables = "select table_name from duckdb_tables() where table_name in (?1, ?1 || '__base', ?1 || '__changes_a',
                  ?1 || '__changes_b')";
    let mut tables = store.prepare(tables).unwrap();
    let tables: Vec<String> = tables.query_map([target], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    assert!(!tables.is_empty(), "there is no target {target}");
    for table in tables {
        store.execute_batch(&statement.replace("TARGET", &table)).unwrap();
    }
}
