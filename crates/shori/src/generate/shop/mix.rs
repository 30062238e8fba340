//! What an application does to its tables, and how often.

use rand::Rng;

/// One row change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    InsertOrder,
    /// Amount or status of a recent order.
    UpdateOrder,
    InsertPayment,
    /// Activity, or more seldom the segment: that touches all orders of the customer.
    UpdateCustomer,
    DeleteOrder,
    /// An order deleted before comes back under its id.
    ReinsertOrder,
    /// As [`Action::UpdateOrder`], but of any order, however old; may move it to another minute.
    UpdateOldOrder,
    /// A payment is booked to another minute.
    MovePayment,
    DeletePayment,
    ChangeOrderKey,
    DeleteCustomer,
    ReinsertCustomer,
}

/// Times that each happens to 1,000 orders: 2,450 changes in all.
const MIX: [(Action, u32); 12] = [
    (Action::InsertOrder, 1_000),
    (Action::UpdateOrder, 450),
    (Action::InsertPayment, 800),
    (Action::UpdateCustomer, 73),
    (Action::DeleteOrder, 35),
    (Action::ReinsertOrder, 20),
    (Action::UpdateOldOrder, 40),
    (Action::MovePayment, 15),
    (Action::DeletePayment, 10),
    (Action::ChangeOrderKey, 5),
    (Action::DeleteCustomer, 1),
    (Action::ReinsertCustomer, 1),
];

const TOTAL: u32 = 2_450;

pub(super) fn draw_action(rng: &mut impl Rng) -> Action {
    let mut point = rng.random_range(0..TOTAL);
    for (action, share) in MIX {
        if point < share {
            return action;
        }
        point -= share;
    }
    Action::InsertOrder
}

/// Open 70 %, paid 20 %, cancelled 10 %.
pub(super) fn draw_status(rng: &mut impl Rng) -> &'static str {
    match rng.random_range(0..10) {
        0..7 => "open",
        7..9 => "paid",
        _ => "cancelled",
    }
}

const SEGMENTS: [&str; 4] = ["consumer", "business", "enterprise", "public"];

pub(super) fn draw_segment(rng: &mut impl Rng) -> &'static str {
    SEGMENTS[rng.random_range(0..SEGMENTS.len())]
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn the_mix_is_complete_and_an_order_makes_2_45_changes() {
        assert_eq!(MIX.iter().map(|(_, share)| share).sum::<u32>(), TOTAL);
        assert_eq!(f64::from(TOTAL) / f64::from(MIX[0].1), 2.45);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (action, _) in MIX {
            assert!((0..1_000_000).any(|_| draw_action(&mut rng) == action), "{action:?}");
        }
    }
}
