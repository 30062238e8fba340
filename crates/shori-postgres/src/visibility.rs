//! Which transactions a snapshot shows.

use std::fmt;

use shori_core::{Error, ErrorKind, Result};

/// A snapshot as `pg_current_snapshot` tells it: `xmin:xmax:xip,…`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Visibility {
    /// Every transaction with a lower id has ended.
    oldest: u64,
    /// None from here on is shown: it follows the last one that has ended.
    next: u64,
    /// Ids below that are not shown. Those of subtransactions are not told.
    pub running: Vec<u64>,
}

/// What a snapshot says of who wrote a row that a later one shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shown {
    Yes,
    No,
    /// Yes, or it was part of a transaction that still ran.
    Unknown,
}

impl Visibility {
    pub fn read(text: &str) -> Result<Self> {
        Self::parse(text)
            .ok_or_else(|| Error::new(ErrorKind::Data, "read", "the server's snapshot", format!("{text:?} is none")))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (oldest, next) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let running = parts.next()?.split(',').filter(|id| !id.is_empty());
        Some(Self { oldest, next, running: running.map(str::parse).collect::<Result<_, _>>().ok()? })
    }

    /// Whether a transaction that has ended is shown; the stream knows the lower half of its id.
    pub fn shows(&self, xid: u32) -> bool {
        let id = self.whole_id(xid);
        id < self.next && !self.running.contains(&id)
    }

    /// Whether it shows what `xid`, a transaction or part of one, wrote and committed.
    pub fn tells(&self, xid: u32) -> Shown {
        let id = self.whole_id(xid);
        if id < self.oldest {
            Shown::Yes
        } else if id >= self.next || self.running.contains(&id) {
            Shown::No
        } else if self.running.iter().any(|running| *running < id) {
            Shown::Unknown
        } else {
            Shown::Yes
        }
    }

    /// The lower half of the oldest id that may not be shown.
    pub fn oldest_xid(&self) -> u32 {
        (self.oldest & u64::from(u32::MAX)) as u32
    }

    /// The first id that is not shown and not told to run either, whether or not it does.
    pub fn first_unlisted(&self) -> u64 {
        self.next
    }

    /// An id by its lower half.
    pub fn whole_id(&self, xid: u32) -> u64 {
        let near = (self.next & !u64::from(u32::MAX)) | u64::from(xid);
        let half = 1 << 31;
        if near > self.next.saturating_add(half) {
            near.saturating_sub(1 << 32)
        } else if near.saturating_add(half) < self.next {
            near + (1 << 32)
        } else {
            near
        }
    }
}

impl fmt::Display for Visibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running: Vec<String> = self.running.iter().map(u64::to_string).collect();
        write!(f, "{}:{}:{}", self.oldest, self.next, running.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_shows_what_had_ended() {
        let sight = Visibility::parse("100:110:100,105").unwrap();
        for (xid, shown) in
            [(99, true), (100, false), (101, true), (105, false), (109, true), (110, false), (u32::MAX, true)]
        {
            assert_eq!(sight.shows(xid), shown, "{xid}");
        }
        let wrapped = Visibility::parse(&format!("{0}:{1}:{0}", (7_u64 << 32) - 2, (7_u64 << 32) + 3)).unwrap();
        for (xid, shown) in
            [(u32::MAX - 2, true), (u32::MAX - 1, false), (u32::MAX, true), (0, true), (2, true), (3, false)]
        {
            assert_eq!(wrapped.shows(xid), shown, "{xid}");
        }
        assert!(Visibility::parse("10:10:").unwrap().running.is_empty());
        assert!(["", "1", "1:2", "1:x:", "1:2:x"].into_iter().all(|text| Visibility::parse(text).is_none()));
    }

    #[test]
    fn what_may_be_part_of_a_running_transaction_is_not_known() {
        let sight = Visibility::parse("100:110:100,105").unwrap();
        for (xid, shown) in [
            (2, Shown::Yes),
            (99, Shown::Yes),
            (100, Shown::No),
            (101, Shown::Unknown),
            (105, Shown::No),
            (109, Shown::Unknown),
            (110, Shown::No),
        ] {
            assert_eq!(sight.tells(xid), shown, "{xid}");
        }
        let at_rest = Visibility::parse("110:110:").unwrap();
        assert_eq!([109, 110].map(|xid| at_rest.tells(xid)), [Shown::Yes, Shown::No]);
        assert_eq!(sight.to_string(), "100:110:100,105");
        assert_eq!(at_rest.to_string(), "110:110:");
    }
}
