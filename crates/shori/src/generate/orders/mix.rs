//! What happens to orders, and how often.

use rand::Rng;

use crate::generate::counts::Operation;

/// Of a round: an operation, by how many in a hundred it comes, and on how many rows at most.
const ROUND: [(Operation, u32, u32); 3] =
    [(Operation::Insert, 30, 3), (Operation::Update, 40, 3), (Operation::Delete, 20, 2)];

/// The rows of a round in a thousand rounds, on average: 1,700.
const ROWS: [(Operation, u32); 3] = [(Operation::Insert, 600), (Operation::Update, 800), (Operation::Delete, 300)];
const ROWS_TOTAL: u32 = 1_700;

/// What one round does: each operation comes by its own chance, so it may be nothing.
pub(super) fn draw_round(rng: &mut impl Rng) -> Vec<Operation> {
    let mut drawn = Vec::new();
    for (operation, percent, rows_max) in ROUND {
        if rng.random_range(0..100) < percent {
            let rows = rng.random_range(1..=rows_max);
            drawn.extend(std::iter::repeat_n(operation, rows as usize));
        }
    }
    drawn
}

/// One row change where rounds do not matter: each operation as often as rounds bring it.
pub(super) fn draw_operation(rng: &mut impl Rng) -> Operation {
    let mut point = rng.random_range(0..ROWS_TOTAL);
    for (operation, share) in ROWS {
        if point < share {
            return operation;
        }
        point -= share;
    }
    Operation::Insert
}

const STATUSES: [&str; 5] = ["processing", "shipped", "delivered", "cancelled", "returned"];

pub(super) fn draw_status(rng: &mut impl Rng) -> &'static str {
    STATUSES[rng.random_range(0..STATUSES.len())]
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const ROUNDS: u32 = 100_000;

    fn near(what: &str, found: f64, expected: f64) {
        assert!((found - expected).abs() < 0.01 * expected.max(1.0), "{what}: {found}, not {expected}");
    }

    fn rows(round: &[Operation], of: Operation) -> usize {
        round.iter().filter(|operation| **operation == of).count()
    }

    #[test]
    fn a_round_inserts_updates_and_deletes_by_its_chances() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let rounds: Vec<_> = (0..ROUNDS).map(|_| draw_round(&mut rng)).collect();
        for (operation, percent, rows_max) in ROUND {
            let counts: Vec<usize> = rounds.iter().map(|round| rows(round, operation)).collect();
            let came = counts.iter().filter(|count| **count > 0).count();
            near("chance", came as f64 / f64::from(ROUNDS), f64::from(percent) / 100.0);
            for wanted in 1..=rows_max {
                let share = counts.iter().filter(|count| **count == wanted as usize).count() as f64 / came as f64;
                near("rows", share, 1.0 / f64::from(rows_max));
            }
            assert!(counts.iter().all(|count| *count <= rows_max as usize), "{operation:?}");
        }
        let nothing = rounds.iter().filter(|round| round.is_empty()).count();
        near("rounds of nothing", nothing as f64 / f64::from(ROUNDS), 0.7 * 0.6 * 0.8);
    }

    #[test]
    fn single_changes_come_as_often_as_rounds_bring_them() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let drawn: Vec<_> = (0..ROUNDS).map(|_| draw_operation(&mut rng)).collect();
        for ((operation, share), (_, percent, rows_max)) in ROWS.into_iter().zip(ROUND) {
            // Of 1 to n rows there are (n + 1) / 2 on average; in a thousand rounds, each percent comes ten times.
            assert_eq!(share, percent * 10 * (rows_max + 1) / 2, "{operation:?}");
            near("share", rows(&drawn, operation) as f64 / f64::from(ROUNDS), f64::from(share) / f64::from(ROWS_TOTAL));
        }
        assert_eq!(ROWS.iter().map(|(_, share)| share).sum::<u32>(), ROWS_TOTAL);
    }

    #[test]
    fn equal_seeds_draw_equal_rounds() {
        let rounds = |seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            (0..1_000).map(|_| draw_round(&mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
    }
}
