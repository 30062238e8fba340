//! A PostgreSQL server of the benchmark's own, in its work folder: started by each task, and stopped at its end.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use shori_core::{Error, ErrorKind, Result};
use shori_postgres::{Server as Address, Session, Tls};
use std::time::Duration;

use crate::bench::Place;

pub(super) const DATABASE: &str = "bench";
/// The servers: that of the application, and that of the results.
pub(super) const SOURCE: &str = "postgres";
pub(super) const WAREHOUSE: &str = "warehouse";

const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
wal_level = logical
max_wal_size = 16GB
shared_buffers = 512MB
autovacuum = off
jit = off
";

pub(super) struct Server {
    data: PathBuf,
    programs: PathBuf,
    port: u16,
}

fn fail(object: &str) -> impl Fn(String) -> Error {
    let object = object.to_string();
    move |cause| Error::new(ErrorKind::Refused, "run", object.clone(), cause)
}

impl Server {
    /// A new cluster with an empty database.
    pub fn make(place: &Place, name: &str) -> Result<Self> {
        let folder = place.fresh(name)?;
        let data = folder.join("data");
        let programs = programs()?;
        let server = Self { port: free_port()?, data, programs };
        server.own(&folder)?;
        server.start_program(
            "initdb",
            &["-D", "{data}", "-U", "postgres", "--auth=trust", "--locale=C", "-E", "UTF8", "-N"],
        )?;
        let path = server.data.join("postgresql.conf");
        let written = std::fs::read_to_string(&path).and_then(|text| {
            std::fs::write(&path, format!("{text}{SETTINGS}unix_socket_directories = '{}'\n", server.data.display()))
        });
        written.map_err(|cause| fail("initdb")(cause.to_string()))?;
        server.start()?;
        let made = crate::cli::block_on(async {
            let session = address(server.port, "postgres").connect().await?;
            session.client.batch_execute(&format!("create database {DATABASE}")).await.map_err(refused)
        });
        made.map(|()| server)
    }

    /// The cluster that an earlier task made.
    pub fn again(place: &Place, name: &str) -> Result<Self> {
        let server = Self { port: free_port()?, data: place.folder(name).join("data"), programs: programs()? };
        server.start()?;
        Ok(server)
    }

    fn start(&self) -> Result<()> {
        let options = format!("-p {}", self.port);
        self.start_program("pg_ctl", &["-D", "{data}", "-l", "{data}/log", "-o", &options, "-w", "start"])
    }

    /// Statements, each in a transaction of its own.
    pub async fn run(&self, statements: &[&str]) -> Result<()> {
        let client = &self.connect().await?.client;
        for statement in statements {
            client.batch_execute(statement).await.map_err(refused)?;
        }
        Ok(())
    }

    pub fn folder(&self) -> &Path {
        &self.data
    }

    pub async fn connect(&self) -> Result<Session> {
        address(self.port, DATABASE).connect().await
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// PostgreSQL refuses to run as root: its files and processes are those of the user `postgres` then.
    fn own(&self, folder: &Path) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let status = Command::new("chown").arg("postgres:").arg(folder).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(fail("chown postgres:")(status.to_string())),
            Err(cause) => Err(fail("chown postgres:")(cause.to_string())),
        }
    }

    fn start_program(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let mut command = if rustix::process::geteuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(self.program(program));
            command
        } else {
            Command::new(self.program(program))
        };
        let data = self.data.display().to_string();
        command.args(arguments.iter().map(|argument| argument.replace("{data}", &data)));
        // A server started keeps what it is given.
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        match command.current_dir("/").status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(fail(program)(format!("it ended with {status}; see {data}/log"))),
            Err(cause) => Err(fail(program)(cause.to_string())),
        }
    }
}

pub(super) fn address(port: u16, database: &str) -> Address {
    Address {
        host: "127.0.0.1".into(),
        port,
        database: database.into(),
        user: "postgres".into(),
        password: None,
        tls: Tls::Off,
        connect_timeout: Duration::from_secs(10),
        statement_timeout: Duration::from_secs(3600),
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.start_program("pg_ctl", &["-D", "{data}", "-m", "immediate", "-w", "stop"]) {
            eprintln!("the benchmark's PostgreSQL server still runs: {error}");
        }
    }
}

pub(super) fn refused(cause: tokio_postgres::Error) -> Error {
    let told = cause.as_db_error().map_or_else(|| cause.to_string(), |told| told.message().to_string());
    Error::new(ErrorKind::Refused, "prepare", "the benchmark's PostgreSQL server", told)
}

fn free_port() -> Result<u16> {
    let listening = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listening.map(|address| address.port()).map_err(|cause| fail("a PostgreSQL server")(cause.to_string()))
}

/// The newest programs of Debian's packages, or those in the folder that the environment names.
fn programs() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("SHORI_POSTGRES_BIN") {
        return Ok(named.into());
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().unwrap_or(0);
    let newest = versions.max_by_key(version).map(|entry| entry.path().join("bin"));
    newest.filter(|folder| folder.join("initdb").is_file()).ok_or_else(|| {
        let cause = "no PostgreSQL server is installed";
        Error::new(ErrorKind::Usage, "measure", "suite postgres", cause)
            .with_remedy("install Debian's postgresql, or name a folder of its programs as SHORI_POSTGRES_BIN")
    })
}
