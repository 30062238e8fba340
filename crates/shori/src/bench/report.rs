//! What a benchmark prints: one object a suite, the same for all suites.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use shori_core::Error;

use super::machine::{COMMIT, Machine};

/// What one figure's measurement brought.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// In the figure's unit.
    pub value: f64,
    /// What the same work costs at best, in the same unit, measured in the same run on the same data.
    pub floor: Option<f64>,
    /// Where the value comes from; each name ends with its unit.
    pub parts: BTreeMap<String, f64>,
    /// What a reader must know to read the value.
    pub note: Option<String>,
}

impl Measured {
    pub fn new(value: f64) -> Self {
        Self { value, ..Self::default() }
    }

    pub fn part(mut self, name: &str, value: f64) -> Self {
        self.parts.insert(name.into(), value);
        self
    }
}

/// What must hold for a figure to meet its target.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
    /// The value divided by the floor.
    RatioAtMost(f64),
    RatioAtLeast(f64),
}

impl Bound {
    fn target(self) -> f64 {
        match self {
            Bound::AtLeast(target)
            | Bound::AtMost(target)
            | Bound::RatioAtMost(target)
            | Bound::RatioAtLeast(target) => target,
        }
    }

    fn met(self, value: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Bound::AtLeast(target) => Some(value >= target),
            Bound::AtMost(target) => Some(value <= target),
            Bound::RatioAtMost(target) => ratio.map(|ratio| ratio <= target),
            Bound::RatioAtLeast(target) => ratio.map(|ratio| ratio >= target),
        }
    }
}

/// One figure. `target` bounds `ratio` where there is a floor, else `value`; rates from below, all else from above.
/// `value` is null where the figure was not measured, `met` also where it was measured on less data than the target
/// is for; `note` says why.
#[derive(Clone, Debug, Serialize)]
pub struct FigureReport {
    pub name: String,
    pub value: Option<f64>,
    pub unit: String,
    pub floor: Option<f64>,
    pub ratio: Option<f64>,
    pub target: f64,
    pub met: Option<bool>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub parts: BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    #[serde(skip)]
    bound: Option<Bound>,
    #[serde(skip)]
    failed: bool,
}

impl FigureReport {
    pub fn measured(name: &str, unit: &str, bound: Bound, scale: f64, measured: Measured) -> Self {
        let Measured { value, floor, parts, mut note } = measured;
        let ratio = floor.filter(|floor| *floor > 0.0).map(|floor| value / floor);
        let whole = scale == 1.0;
        if !whole {
            let smaller = format!("scale {scale}: the target is for scale 1");
            note = Some(note.map_or(smaller.clone(), |note| format!("{smaller}; {note}")));
        }
        Self {
            name: name.into(),
            value: Some(rounded(value)),
            unit: unit.into(),
            floor: floor.map(rounded),
            ratio: ratio.map(rounded),
            target: bound.target(),
            met: bound.met(value, ratio).filter(|_| whole),
            parts: parts.into_iter().map(|(name, value)| (name, rounded(value))).collect(),
            note,
            bound: Some(bound),
            failed: false,
        }
    }

    pub fn failed(name: &str, unit: &str, bound: Bound, error: &Error) -> Self {
        Self { failed: true, ..Self::not_run(name, unit, bound, format!("not measured: {error}")) }
    }

    pub fn not_run(name: &str, unit: &str, bound: Bound, why: String) -> Self {
        Self {
            name: name.into(),
            value: None,
            unit: unit.into(),
            floor: None,
            ratio: None,
            target: bound.target(),
            met: None,
            parts: BTreeMap::new(),
            note: Some(why),
            bound: Some(bound),
            failed: false,
        }
    }
}

/// Four significant digits: more would be noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    if digits <= 0 {
        return value.round();
    }
    let factor = 10_f64.powi(digits);
    (value * factor).round() / factor
}

/// What a suite prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub suite: String,
    pub machine: Machine,
    pub commit: &'static str,
    pub figures: Vec<FigureReport>,
}

impl Report {
    pub fn new(suite: &str, figures: Vec<FigureReport>) -> Self {
        Self { suite: suite.into(), machine: Machine::here(), commit: COMMIT, figures }
    }

    /// Whether every figure that was asked for could be measured.
    pub fn is_complete(&self) -> bool {
        !self.figures.iter().any(|figure| figure.failed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, memory_mb, os } = &self.machine;
        writeln!(f, "suite {}, commit {}", self.suite, self.commit)?;
        writeln!(f, "{cpu}, {cores} cores, {memory_mb:.0} MB, {os}\n")?;
        let header = ["figure", "value", "unit", "floor", "ratio", "target", "met"];
        line(f, &header.map(String::from))?;
        for figure in &self.figures {
            let number = |value: Option<f64>| value.map_or("-".to_string(), |value| value.to_string());
            let target = match figure.bound {
                Some(Bound::AtLeast(target)) => format!(">= {target}"),
                Some(Bound::RatioAtMost(target)) => format!("ratio <= {target}"),
                Some(Bound::RatioAtLeast(target)) => format!("ratio >= {target}"),
                _ => format!("<= {}", figure.target),
            };
            let met = figure.met.map_or("-", |met| if met { "yes" } else { "NO" });
            let (name, unit) = (figure.name.clone(), figure.unit.clone());
            line(
                f,
                &[name, number(figure.value), unit, number(figure.floor), number(figure.ratio), target, met.into()],
            )?;
            if let Some(note) = &figure.note {
                writeln!(f, "    {note}")?;
            }
            if !figure.parts.is_empty() {
                let parts: Vec<String> = figure.parts.iter().map(|(name, value)| format!("{name} {value}")).collect();
                writeln!(f, "    {}", parts.join(", "))?;
            }
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, cells: &[String; 7]) -> fmt::Result {
    let [name, value, unit, floor, ratio, target, met] = cells;
    writeln!(f, "{name:<28} {value:>9} {unit:<10} {floor:>8} {ratio:>8} {target:>14} {met:>4}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(value: f64, floor: Option<f64>) -> Measured {
        Measured { value, floor, ..Measured::default() }
    }

    #[test]
    fn a_target_bounds_the_value_or_the_ratio() {
        let met = |bound, measured| FigureReport::measured("f", "s", bound, 1.0, measured).met;
        assert_eq!(met(Bound::AtLeast(10.0), measured(10.0, None)), Some(true));
        assert_eq!(met(Bound::AtMost(10.0), measured(10.1, None)), Some(false));
        assert_eq!(met(Bound::RatioAtMost(0.1), measured(0.2, Some(2.0))), Some(true));
        assert_eq!(met(Bound::RatioAtMost(0.1), measured(0.2, None)), None);
        assert_eq!(met(Bound::RatioAtLeast(0.25), measured(1.0, Some(4.0))), Some(true));
        assert_eq!(met(Bound::RatioAtLeast(0.25), measured(0.9, Some(4.0))), Some(false));
    }

    #[test]
    fn less_data_meets_no_target_and_says_so() {
        let report = FigureReport::measured("f", "s", Bound::AtMost(1.0), 0.01, measured(0.5, None));
        assert_eq!(report.met, None);
        assert!(report.note.is_some_and(|note| note.contains("scale 0.01")));
    }

    #[test]
    fn the_object_has_the_keys_that_every_suite_has() {
        let figures = vec![FigureReport::measured("f", "s", Bound::AtMost(1.0), 1.0, measured(0.123456, None))];
        let json = serde_json::to_value(Report::new("engine", figures)).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        assert_eq!(keys, ["suite", "machine", "commit", "figures"]);
        let figure: Vec<_> = json["figures"][0].as_object().unwrap().keys().cloned().collect();
        assert_eq!(figure, ["name", "value", "unit", "floor", "ratio", "target", "met"]);
        assert_eq!(json["figures"][0]["value"], 0.1235);
    }

    #[test]
    fn numbers_keep_four_digits() {
        assert_eq!(rounded(151_234.5), 151_235.0);
        assert_eq!(rounded(0.012_345), 0.01235);
        assert_eq!(rounded(0.0), 0.0);
    }
}
