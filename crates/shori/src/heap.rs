//! The process's heap: jemalloc, for the C and C++ libraries too, and what it keeps of freed memory.
//!
//! DuckDB plans every statement anew, in thousands of small pieces, and batches of Arrow go from thread to thread. With
//! glibc's heap bounded so that it keeps little, a sixth of all processor time was its own; unbounded, it kept as much again as
//! was in use. What DuckDB holds of tables does not come from here: it has an allocator of its own.
//!
//! Elsewhere the system's heap serves.

#[global_allocator]
static HEAP: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Read by jemalloc when it begins. Few threads work at a time: two arenas. Freed pages go back within a quarter of a second
/// (jemalloc.net/jemalloc.3.html, TUNING).
#[expect(unsafe_code, reason = "the library finds its options by this name")]
#[unsafe(export_name = "malloc_conf")]
static MALLOC_CONF: &[u8; 46] = b"narenas:2,dirty_decay_ms:250,muzzy_decay_ms:0\0";
