//! What a target that takes its time means to the others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::event::{Event, Events};
use crate::ingest::IngestSettings;
use crate::pipeline::{Pipeline, Retention, Settings};
use crate::project::{Progress, ProjectSettings};
use crate::retry::RetryPolicy;
use crate::source::BatchLimit;
use crate::testing::faults::{FaultPlan, Faults};
use crate::testing::memory_database::{FIRST_COMMIT_TIME, MemoryDatabase, Write, commit_of};
use crate::testing::memory_source::{MemorySource, SourceHabits};
use crate::testing::memory_store::MemoryStorage;
use crate::testing::memory_transform::MemoryCache;
use crate::testing::model_projections::latest;
use crate::testing::simulation::faulty::FaultyStore;
use crate::testing::transactions::model_tables;
use crate::testing::value::Value;

const COMMITS: u64 = 200;
/// Between two commits, of the runtime's time.
const PAUSE: Duration = Duration::from_millis(100);

/// When each commit was first shown.
type Shown = Arc<Mutex<BTreeMap<u64, Instant>>>;

fn pipeline(database: &MemoryDatabase, shown: &Shown) -> Pipeline {
    let (storage, shown) = (MemoryStorage::new("store"), shown.clone());
    let store = Arc::new(storage.open(Faults::none()));
    let sleeps = FaultPlan { sleeps: 1000, longest_sleep: Duration::from_secs(5), ..FaultPlan::NONE };
    let slow = Arc::new(FaultyStore { inner: store.clone(), faults: Faults::seeded(7, sleeps) });
    let (slow_one, quick_one) = (latest("orders"), latest("customers"));
    let quick = quick_one.name.clone();
    let poll_interval = Duration::from_millis(10);
    let retry = RetryPolicy::default();
    Pipeline {
        name: "shop".into(),
        run_id: "run".into(),
        sources: vec![Box::new(MemorySource::new(database, Faults::none(), SourceHabits::PLAIN))],
        staging: store.clone(),
        transform: Arc::new(MemoryCache::default().open(Faults::none())),
        projections: vec![(slow_one, slow), (quick_one, store)],
        settings: Settings {
            ingest: IngestSettings {
                batch: BatchLimit { rows: 1_000, bytes: 1 << 20 },
                poll_interval,
                linger: Duration::ZERO,
                retry,
                once: false,
            },
            project: ProjectSettings { interval: Duration::from_secs(1), debounce: Duration::ZERO, retry, once: false },
            retention: Retention { keep: None, keep_rows: None, every: None },
        },
        events: Events::new(move |event| {
            let Event::Projected { projection, positions, .. } = event else { return };
            if let (true, Some(position)) = (*projection == quick, positions.values().next()) {
                shown.lock().unwrap().insert(commit_of(position), Instant::now());
            }
        }),
    }
}

/// Contract 11. Until it has shown that it is slow, a commit is waited for, but not for long.
#[tokio::test(start_paused = true)]
async fn contract11_a_slow_target_holds_up_no_neighbour() {
    let database = MemoryDatabase::new("shop", model_tables());
    let shown = Shown::default();
    let prepared = pipeline(&database, &shown).prepare();
    let mut handle = prepared.handle();
    let commits = async {
        // Where state may begin is not known before every target has told where it stands, the slow one too.
        let stands = |progress: &Progress| progress.checkpoints.get("customers_latest").is_some_and(Option::is_some);
        handle.progress.wait_for(stands).await.unwrap();
        let mut committed = Vec::new();
        for number in 0..COMMITS {
            let id = Value::Integer(number as i64);
            let customer = vec![id.clone(), Value::Null, Value::Null];
            let order = vec![id, Value::Null, Value::Null, Value::Null, Value::Null];
            let write = |table: &str, row: Vec<Value>| Write::Insert { table: table.into(), row: row.into() };
            let commit = database
                .commit(FIRST_COMMIT_TIME + number as i64, &[write("customers", customer), write("orders", order)]);
            committed.push((commit, Instant::now()));
            sleep(PAUSE).await;
        }
        let last = committed.last().map(|(commit, _)| *commit);
        let reached = |progress: &Progress| {
            let shown = progress.checkpoints["customers_latest"].as_ref();
            shown.and_then(|shown| shown.values().next().map(commit_of)) >= last
        };
        handle.progress.wait_for(reached).await.unwrap();
        let shown = shown.lock().unwrap();
        let delays = committed.iter().map(|(commit, at)| {
            let (_, seen) = shown.range(commit..).next().expect("every commit is shown");
            *seen - *at
        });
        delays.collect::<Vec<_>>()
    };
    let delays = tokio::select! {
        ended = prepared.run() => panic!("the pipeline has ended: {ended:?}"),
        delays = commits => delays,
    };
    let longest = |delays: &[Duration]| delays.iter().max().copied().unwrap_or_default();
    let (early, late) = delays.split_at(delays.len() / 2);
    assert!(longest(early) <= Duration::from_millis(350), "while it was not known to be slow: {:?}", longest(early));
    assert!(longest(late) <= Duration::from_millis(100), "since it is: {:?}", longest(late));
}
