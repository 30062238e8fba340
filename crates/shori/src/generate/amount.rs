//! Amounts of money as text: no digit is lost on the way into any database.

use rand::Rng;

/// Writes an amount between 1.00 and 999.99 into `text`.
pub(super) fn draw_amount(rng: &mut impl Rng, text: &mut String) {
    let cents: u32 = rng.random_range(100..100_000);
    let (units, hundredths) = (cents / 100, cents % 100);
    text.clear();
    let mut place = if units >= 100 {
        100
    } else if units >= 10 {
        10
    } else {
        1
    };
    while place > 0 {
        text.push((b'0' + (units / place % 10) as u8) as char);
        place /= 10;
    }
    text.push('.');
    text.push((b'0' + (hundredths / 10) as u8) as char);
    text.push((b'0' + (hundredths % 10) as u8) as char);
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn amounts_have_two_decimals() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut text = String::new();
        for _ in 0..10_000 {
            draw_amount(&mut rng, &mut text);
            let number: f64 = text.parse().unwrap();
            assert_eq!(format!("{number:.2}"), text);
            assert!((1.0..1_000.0).contains(&number));
        }
    }
}
