//! Kinds of stores: what each can do for the verbs, beyond the trait that the engine needs.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use shori_core::schema::type_name;
use shori_core::store::Store;
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::database::Database;
use shori_duckdb::store::{self, DuckdbStore};
use shori_postgres::store::{self as postgres, PostgresStore};

use crate::config::{Loaded, StoreConfig, StoreKind};
use crate::systems;

/// A store of a pipeline.
#[derive(Clone)]
pub enum OpenStore {
    Duckdb(Arc<DuckdbStore>),
    Postgres(Arc<PostgresStore>),
}

/// An answer to a question, being given.
pub enum Answer {
    Duckdb(store::Answer),
    Postgres(Box<postgres::Answer>),
}

impl OpenStore {
    pub fn open(loaded: &Loaded, config: &StoreConfig, database: &Database) -> Result<Self> {
        Ok(match config.kind {
            StoreKind::Duckdb => {
                let opened = DuckdbStore::open(database, &loaded.resolve(config.file()), &config.name)?;
                Self::Duckdb(Arc::new(opened))
            }
            StoreKind::Postgres => {
                let no_server =
                    || loaded.wrong(&format!("store {}", config.name), "it has no server, which says where it is");
                let server = systems::server(loaded, config.server.as_ref().ok_or_else(no_server)?)?;
                Self::Postgres(Arc::new(PostgresStore::new(server, config.schema().to_string())))
            }
        })
    }

    /// As the engine knows it.
    pub fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Duckdb(store) => store.clone(),
            Self::Postgres(store) => store.clone(),
        }
    }

    /// Begins to answer a question in the store's own SQL.
    pub async fn stream(&self, sql: &str) -> Result<Answer> {
        Ok(match self {
            Self::Duckdb(store) => Answer::Duckdb(store.stream(sql).await?),
            Self::Postgres(store) => Answer::Postgres(Box::new(store.stream(sql).await?)),
        })
    }

    /// The answer to a question for few rows. An empty one is one batch without rows.
    pub async fn query(&self, sql: &str) -> Result<Vec<RecordBatch>> {
        match self {
            Self::Duckdb(store) => store.query(sql).await,
            Self::Postgres(store) => store.query(sql).await,
        }
    }
}

impl Answer {
    pub fn schema(&self) -> &SchemaRef {
        match self {
            Self::Duckdb(answer) => answer.schema(),
            Self::Postgres(answer) => answer.schema(),
        }
    }

    /// The next rows. After an error there are none.
    pub async fn next(&mut self) -> Option<Result<RecordBatch>> {
        match self {
            Self::Duckdb(answer) => answer.next().await,
            Self::Postgres(answer) => answer.next().await,
        }
    }
}

/// What a kind of store calls in its own way.
impl StoreKind {
    /// Bytes as hexadecimal digits in lower case.
    pub fn hex(self, bytes: &str) -> String {
        match self {
            Self::Duckdb => format!("lower(hex({bytes}))"),
            Self::Postgres => format!("encode({bytes}, 'hex')"),
        }
    }

    /// A time as ISO 8601 has it, UTC.
    pub fn iso_time(self, time: &str) -> String {
        match self {
            Self::Duckdb => format!("strftime({time}, '%Y-%m-%dT%H:%M:%S.%fZ')"),
            Self::Postgres => format!("to_char({time}, 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"),
        }
    }

    /// Microseconds since 1970, as text.
    pub fn micros(self, time: &str) -> String {
        match self {
            Self::Duckdb => format!("cast(epoch_us({time}) as varchar)"),
            Self::Postgres => format!("cast(cast(extract(epoch from {time}) * 1000000 as bigint) as varchar)"),
        }
    }

    /// A row where a pipeline has made its tables, else none.
    pub fn has_tables(self) -> &'static str {
        match self {
            Self::Duckdb => "select name from (show tables) where name = 'ctl_ingestion_watermarks'",
            Self::Postgres => "select 1 as made where to_regclass('ctl_ingestion_watermarks') is not null",
        }
    }
}

/// What DuckDB calls the type of a column that a store serves.
pub fn duckdb_type(data_type: &DataType) -> Result<String> {
    let name = type_name(data_type);
    Ok(match name.as_str() {
        "int16" => "smallint".into(),
        "int32" => "integer".into(),
        "int64" => "bigint".into(),
        "float32" => "float".into(),
        "float64" => "double".into(),
        "text" => "varchar".into(),
        "binary" => "blob".into(),
        // These are called the same.
        "boolean" | "date" | "time" | "timestamp" | "timestamptz" => name,
        _ if name.starts_with("decimal(") => name,
        _ => return Err(Error::new(ErrorKind::Refused, "verify", "a column", format!("its type is {name}"))),
    })
}
