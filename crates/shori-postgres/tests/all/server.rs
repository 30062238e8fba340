//! Real PostgreSQL servers for tests, on a loopback port, in a temporary folder each. Linux only.
//!
//! Constraints: nothing of a server may outlive the test process, however that ends, and statics are never dropped; and
//! `postgres` refuses to run as root.
//!
//! Hence everything is done by a watchdog, a small `sh` per folder that runs what it reads from a pipe whose other end
//! only this process holds. When the pipe closes it ends its server and removes the folder. Where we are root, the
//! server runs as the user `postgres`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// The one role that has to show a password over TCP, for replication too. Anyone else is trusted.
pub const SCRAM_USER: &str = "scram_user";
pub const SCRAM_PASSWORD: &str = "correct horse";

const POLL: Duration = Duration::from_millis(10);
/// For a server to start, recover or stop; much more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
const PORT_TRIES: usize = 20;

/// Signals are repeated at the end because a shell's background child ignores SIGQUIT until it has set its handlers;
/// SIGCONT wakes a postmaster stopped halfway through `Server::kill`. Nobody may be left to read the last answer.
const WATCHDOG: &str = r#"
trap : PIPE
folder=$1 pid= as=
newest=$(ls /usr/lib/postgresql/*/bin/postgres | sort -V | tail -n 1)
bin=${SHORI_POSTGRES_BIN:-$(dirname "${newest:-$(pg_config --bindir)/postgres}")}
[ -x "$bin/initdb" ] ||
    echo "no PostgreSQL server: install Debian's postgresql, or set SHORI_POSTGRES_BIN to a bin folder" >&2
if [ "$(id -u)" = 0 ]; then
    chown postgres: "$folder"
    as='setpriv --reuid=postgres --regid=postgres --clear-groups'
fi
while read -r order; do
    eval "$order" </dev/null >>"$folder/log" 2>&1
    echo "$? $pid"
done
while [ -n "$pid" ] && kill -QUIT "$pid"; do
    kill -CONT "$pid"
    sleep 0.05
done 2>/dev/null
rm -rf "$folder"
"#;
const INITDB: &str = r#"$as "$bin/initdb" -D "$folder/data" -U postgres -A trust -E UTF8 --locale=C --no-sync"#;
const SINGLE_USER: &str = r#"$as "$bin/postgres" --single -F -D "$folder/data" postgres"#;
const POSTGRES: &str = r#"$as "$bin/postgres" -D "$folder/data" -k "$folder" -p"#;

const CONFIGURATION: &str = "
listen_addresses = '127.0.0.1'
wal_level = logical
max_replication_slots = 100
max_wal_senders = 100
max_connections = 200
autovacuum = off
fsync = off
";
const AUTHENTICATION: &str = "
local all all trust
host all scram_user 127.0.0.1/32 scram-sha-256
host replication scram_user 127.0.0.1/32 scram-sha-256
host all all 127.0.0.1/32 trust
host replication all 127.0.0.1/32 trust
";

/// A cluster and, unless stopped, its server. Dropping it ends the server at once and removes its data.
///
/// Starting and stopping block the calling thread and panic with the end of the server's log if they fail.
pub struct Server {
    watchdog: Watchdog,
    port: u16,
    /// The postmaster's process id while it runs.
    postmaster: Mutex<Option<i32>>,
}

impl Server {
    /// The one for all tests that neither stop nor reconfigure it; what they share is roles, slots and WAL.
    pub fn shared() -> &'static Server {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(|| Server::start(&[]))
    }

    /// A cluster of its own, with `settings` on top of the usual. All of them have the same system identifier: they are
    /// copies of one.
    pub fn start(settings: &[(&str, &str)]) -> Server {
        static TEMPLATE: LazyLock<Watchdog> = LazyLock::new(new_cluster);
        let watchdog = Watchdog::new();
        watchdog.run(&format!("cp -a '{}/data' \"$folder/data\"", TEMPLATE.folder.display()));
        Server::first_start(watchdog, settings)
    }

    /// As `start`, with another system identifier than every other cluster; slower.
    pub fn start_unrelated(settings: &[(&str, &str)]) -> Server {
        Server::first_start(new_cluster(), settings)
    }

    /// A hot standby of this server, which is stopped for it and started again: a copy of what a stopped server left needs
    /// no backup program, which not every folder of PostgreSQL's programs has. It follows when it returns.
    pub fn start_standby(&self) -> Server {
        self.stop();
        let watchdog = Watchdog::new();
        let primary = self.watchdog.folder.display();
        watchdog.run(&format!("cp -a '{primary}/data' \"$folder/data\" && $as touch \"$folder/data/standby.signal\""));
        self.start_again();
        let primary = format!("host=127.0.0.1 port={} user=postgres", self.port);
        Server::first_start(watchdog, &[("hot_standby", "on"), ("primary_conninfo", &primary)])
    }

    fn first_start(watchdog: Watchdog, settings: &[(&str, &str)]) -> Server {
        let file = watchdog.folder.join("data/postgresql.conf");
        let mut configuration = fs::read_to_string(&file).unwrap() + CONFIGURATION;
        for (name, value) in settings {
            configuration += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        }
        fs::write(file, configuration).unwrap();
        for _ in 0..PORT_TRIES {
            let port = free_port();
            match watchdog.start_postgres(port) {
                Ok(pid) => return Server { watchdog, port, postmaster: Mutex::new(Some(pid)) },
                Err(log) if log.contains("Address already in use") => {}
                Err(log) => panic!("PostgreSQL does not start:\n{log}"),
            }
        }
        panic!("no free port in {PORT_TRIES} tries");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A new, empty database.
    pub async fn create_database(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let client = self.connect("postgres").await;
        client.batch_execute(&format!("create database {name}")).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        name
    }

    /// As superuser.
    pub async fn connect(&self, database: &str) -> Client {
        self.try_connect(database).await.unwrap_or_else(|cause| panic!("connecting to {database}: {cause:?}"))
    }

    pub async fn try_connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").dbname(database).connect_timeout(PATIENCE);
        let (client, connection) = config.connect(NoTls).await?;
        // Its errors are the client's too.
        tokio::spawn(connection);
        Ok(client)
    }

    /// SIGKILL to the postmaster and all its processes, as a power loss for the server. What they wrote stays in the
    /// system's cache, hence `fsync = off` loses nothing.
    pub fn kill(&self) {
        let mut postmaster = self.postmaster.lock().unwrap();
        let pid = postmaster.take().expect("the server runs");
        // Stopped first: it must start no process that the list lacks, nor tell one to end.
        stop_process(pid);
        let mut all = children(pid);
        all.push(pid);
        signal("KILL", &all);
        self.watchdog.reap(pid);
        wait_until("killed processes are gone", || all.iter().all(|&pid| !is_alive(pid)));
    }

    /// Fast shutdown: clients are cut off and a checkpoint is written. Does nothing when stopped already. A replication
    /// client is waited for until it has confirmed all WAL or `wal_sender_timeout` is over.
    pub fn stop(&self) {
        let Some(pid) = self.postmaster.lock().unwrap().take() else { return };
        signal("INT", &[pid]);
        wait_until("the server has stopped", || !is_alive(pid));
        self.watchdog.reap(pid);
    }

    /// On the same port and data, after `kill` or `stop`; returns when recovery is over and clients can connect.
    pub fn start_again(&self) {
        let mut postmaster = self.postmaster.lock().unwrap();
        assert!(postmaster.is_none(), "the server runs");
        let started = self.watchdog.start_postgres(self.port);
        *postmaster = Some(started.unwrap_or_else(|log| panic!("PostgreSQL does not start again:\n{log}")));
    }

    /// SIGSTOP to the backend or WAL sender `pid`: its connection stays open and silent. Thaw it before `stop`.
    pub fn freeze(&self, pid: i32) {
        let postmaster = self.postmaster.lock().unwrap().expect("the server runs");
        assert!(children(postmaster).contains(&pid), "{pid} is no process of this server");
        stop_process(pid);
    }

    pub fn thaw(&self, pid: i32) {
        signal("CONT", &[pid]);
    }

    /// Stops the server and has its write-ahead log kept in `folder`; `start_again` follows.
    #[allow(dead_code, reason = "for tests of the program, which have this file, too")]
    pub fn move_log(&self, folder: &Path) {
        self.stop();
        let (log, to) = ("\"$folder/data/pg_wal\"", folder.display());
        self.watchdog.run(&format!("mv {log}/* '{to}' && rmdir {log} && ln -s '{to}' {log}"));
    }

    /// All that the server has told.
    #[allow(dead_code, reason = "for tests of the program, which have this file, too")]
    pub fn told(&self) -> String {
        fs::read_to_string(self.watchdog.folder.join("log")).unwrap_or_default()
    }

    /// Stops the server and copies its data, to go back to; lives no longer than the server does.
    pub fn copy_data(&self) -> TempDir {
        self.stop();
        let copy = TempDir::new_in(&self.watchdog.folder).unwrap();
        self.watchdog.run(&format!("cp -a \"$folder/data\" '{}'", copy.path().display()));
        copy
    }

    /// Stops the server and puts back what `copy_data` copied, as often as wanted; `start_again` follows.
    pub fn restore_data(&self, copy: &TempDir) {
        self.stop();
        let copy = copy.path().display();
        self.watchdog.run(&format!("rm -rf \"$folder/data\" && cp -a '{copy}/data' \"$folder/data\""));
    }
}

/// What initdb makes, and how clients may log in.
fn new_cluster() -> Watchdog {
    let watchdog = Watchdog::new();
    watchdog.run(INITDB);
    let role = format!("create role {SCRAM_USER} login replication password '{SCRAM_PASSWORD}'");
    watchdog.run(&format!("echo \"{role}\" | {SINGLE_USER}"));
    fs::write(watchdog.folder.join("data/pg_hba.conf"), AUTHENTICATION).unwrap();
    watchdog
}

/// A folder and the shell that removes it. What the shell runs writes to `log` in it.
struct Watchdog {
    folder: PathBuf,
    shell: Mutex<(Child, BufReader<ChildStdout>)>,
}

impl Watchdog {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("shori-postgres-").tempdir().unwrap().keep();
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", WATCHDOG, "watchdog"]).arg(&folder);
        // In a process group of its own, so that Ctrl-C in a terminal does not end it before its work is done.
        shell.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut shell = shell.spawn().unwrap();
        let answers = BufReader::new(shell.stdout.take().unwrap());
        Self { folder, shell: Mutex::new((shell, answers)) }
    }

    /// Runs one line of shell; answers its exit status and the server's process id as last started.
    fn order(&self, line: &str) -> (i32, i32) {
        let (shell, answers) = &mut *self.shell.lock().unwrap();
        writeln!(shell.stdin.as_mut().unwrap(), "{line}").unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        let (status, pid) = answer.trim_end_matches('\n').split_once(' ').expect("an answer of the watchdog");
        (status.parse().unwrap(), pid.parse().unwrap_or(0))
    }

    fn run(&self, line: &str) {
        let (status, _) = self.order(line);
        assert!(status == 0, "exit status {status} of {line}:\n{}", self.log_tail());
    }

    /// Ready when it returns; `Err` with the end of the log when the server ended instead.
    fn start_postgres(&self, port: u16) -> Result<i32, String> {
        let (_, pid) = self.order(&format!("{POSTGRES} {port} & pid=$!"));
        // As pg_ctl does it: the last line tells when connections are accepted.
        let is_ready = || {
            let state = fs::read_to_string(self.folder.join("data/postmaster.pid")).unwrap_or_default();
            let mut lines = state.lines();
            lines.next() == Some(&pid.to_string()) && lines.nth(6).is_some_and(|status| status.trim() == "ready")
        };
        wait_until("the server is ready", || is_ready() || !is_alive(pid));
        if is_alive(pid) {
            return Ok(pid);
        }
        self.reap(pid);
        Err(self.log_tail())
    }

    fn reap(&self, pid: i32) {
        self.order(&format!("wait {pid}; pid="));
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // Closes the pipe, then waits.
        let shell = self.shell.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let _ = shell.0.wait();
    }
}

/// Below what Linux gives to outgoing connections: there a port could be taken while its server is stopped, or a client
/// that retries be connected to itself.
fn free_port() -> u16 {
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() % 100 * 100;
    let port = || 20_000 + ((first + TRIED.fetch_add(1, Ordering::Relaxed)) % 10_000) as u16;
    let mut ports = std::iter::repeat_with(port).take(10_000);
    ports.find(|&port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()).expect("a free port")
}

fn signal(name: &str, pids: &[i32]) {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    // A process that has ended meanwhile is none to signal.
    Command::new("sh").args(["-c", &format!("kill -{name} {} 2>/dev/null", pids.join(" "))]).status().unwrap();
}

fn stop_process(pid: i32) {
    signal("STOP", &[pid]);
    wait_until("a process is stopped", || process(pid).is_none_or(|(state, _)| "TZ".contains(state)));
}

/// State and parent, see proc(5): `T` is stopped, `Z` ended but not yet waited for.
fn process(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn is_alive(pid: i32) -> bool {
    process(pid).is_some_and(|(state, _)| !"ZX".contains(state))
}

fn children(parent: i32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| process(pid).is_some_and(|(_, of)| of == parent)).collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} until {what}");
        sleep(POLL);
    }
}
