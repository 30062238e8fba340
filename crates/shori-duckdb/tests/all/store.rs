//! The DuckDB store on real files.
