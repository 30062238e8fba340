//! Bounds on what the heap of this process keeps of freed memory.
//!
//! glibc makes a heap for every few threads, and holds arrays of some megabytes for later use once it has seen one freed:
//! with batches of Arrow going from thread to thread, that is as much again as what is in use. Other C libraries have no
//! such bounds, and need none.

/// Heaps that threads share.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS_MAX: i32 = 2;
/// Larger arrays are given back to the system as soon as they are freed; so is so much at a heap's end.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_MAX_BYTES: i32 = 256 << 10;

/// Sets the bounds. Before any other thread stands: a thread stays with the heap that it began with.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the C library is asked")]
pub fn bound() {
    let bounds = [
        (libc::M_ARENA_MAX, HEAPS_MAX),
        (libc::M_MMAP_THRESHOLD, KEPT_MAX_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_MAX_BYTES),
    ];
    for (parameter, value) in bounds {
        // A bound that this C library does not know is none: the process takes more, and works all the same.
        // SAFETY: mallopt takes two numbers and may be called at any time.
        let _ = unsafe { libc::mallopt(parameter, value) };
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn bound() {}
