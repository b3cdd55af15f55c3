//! Measured figures: every value of every round, medians, spread and ratios.
//!
//! `docs/performance.md` describes the keys; they do not change within a format.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use vvu_process::progress::StageTime;
use vvu_testvm::{RunDir, facts};

/// Version of the JSON's keys.
pub(crate) const FORMAT: u32 = 1;
/// The variant that is compared with all others.
pub(crate) const SUBJECT: &str = "vvu";

/// The results of `cargo xtask bench`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    /// [`FORMAT`].
    pub format: u32,
    /// Number of rounds.
    pub rounds: u32,
    /// Seconds that each test took.
    pub seconds: u64,
    /// The machine.
    pub machine: Machine,
    /// The accelerator of the VMs; `null` without VMs.
    pub accelerator: Option<facts::Accelerator>,
    /// The QEMU; `null` without VMs.
    pub qemu: Option<facts::Qemu>,
    /// The guest kernel; `null` without VMs.
    pub kernel: Option<facts::Kernel>,
    /// The VM in which the VMs ran (`--nested`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub outer: Option<facts::Outer>,
    /// The stages of the set-up; with an empty cache they tell how long the first set-up takes.
    pub setup_stages: Vec<StageTime>,
    /// The figures.
    pub results: Vec<Metric>,
    /// Measurements that were left out, with the reasons.
    pub skipped: Vec<Skipped>,
}

/// The machine during the measurement.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Processors this process may use.
    pub cpus: usize,
    /// Load averages over 1, 5 and 15 minutes before the run.
    pub load_before: Vec<f64>,
    /// Load averages after the run.
    pub load_after: Vec<f64>,
}

impl Machine {
    /// This machine, now.
    pub(crate) fn now() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cpus, load_before: load(), load_after: Vec::new() }
    }
}

/// The load averages; empty if /proc/loadavg cannot be read.
pub(crate) fn load() -> Vec<f64> {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).filter_map(|word| word.parse().ok()).collect()
}

/// Something that was not measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Skipped {
    /// A variant or a group of metrics.
    pub what: String,
    /// The reason.
    pub reason: String,
}

/// Which values are better.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Lower ones: times and counts.
    #[default]
    Lower,
    /// Higher ones: rates.
    Higher,
}

/// Identifies a figure.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Key {
    /// `chain`, `vms` or `start-up`.
    pub group: String,
    /// The test.
    pub test: String,
    /// The metric, whose last word is the unit.
    pub metric: String,
}

/// A figure of all variants.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Metric {
    #[serde(flatten)]
    pub key: Key,
    /// Which values are better.
    pub better: Better,
    /// Values by variant.
    pub variants: BTreeMap<String, Values>,
    /// Ratio of `vvu` to each other variant.
    pub ratios: BTreeMap<String, Ratio>,
}

/// The values of one variant.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Values {
    /// Number of values.
    pub n: usize,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// One value of each round, in order.
    pub values: Vec<f64>,
    /// The round of each value, counted from 1; a round in which the variant failed is missing.
    pub rounds: Vec<u32>,
}

/// How two variants compare.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    /// Ratio of the medians.
    pub of_medians: f64,
    /// Smallest ratio of one round.
    pub min: f64,
    /// Largest ratio of one round.
    pub max: f64,
    /// `of_medians` in the baseline (`--baseline`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub baseline: Option<f64>,
}

impl Results {
    /// Reads the JSON of an earlier run.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read or is of another version.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let results: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is no output of bench", path.display()))?;
        ensure!(
            results.format == FORMAT,
            "{} has format {}, want {FORMAT}: measure it again with this version",
            path.display(),
            results.format
        );
        Ok(results)
    }

    /// Adds a value of a round.
    pub(crate) fn add(&mut self, round: u32, key: Key, better: Better, variant: &str, value: f64) {
        let index = self.results.iter().position(|metric| metric.key == key).unwrap_or(self.results.len());
        if index == self.results.len() {
            self.results.push(Metric { key, better, ..Metric::default() });
        }
        let metric = &mut self.results[index];
        metric.variants.entry(variant.to_owned()).or_default().add(round, value);
        metric.update();
    }

    /// Adds the figures of a round that was measured elsewhere, as round number `round`.
    pub(crate) fn add_round(&mut self, round: u32, measured: &Self) {
        for metric in &measured.results {
            for (variant, values) in &metric.variants {
                for value in &values.values {
                    self.add(round, metric.key.clone(), metric.better, variant, *value);
                }
            }
        }
    }

    /// Writes what there is to `bench.json` in the run directory, and returns its text.
    pub(crate) fn write(&self, run: &RunDir) -> Result<String> {
        let json = serde_json::to_string_pretty(self).context("cannot write the results")?;
        run.write("bench.json", &json)?;
        Ok(json)
    }

    /// Adds something that was not measured.
    pub(crate) fn skip(&mut self, what: &str, reason: impl Into<String>) {
        self.skipped.push(Skipped { what: what.to_owned(), reason: reason.into() });
    }

    /// Adds the ratios of `baseline` to those of the same figures.
    pub(crate) fn compare(&mut self, baseline: &Self) {
        for metric in &mut self.results {
            let Some(before) = baseline.results.iter().find(|before| before.key == metric.key) else {
                continue;
            };
            for (variant, ratio) in &mut metric.ratios {
                ratio.baseline = before.ratios.get(variant).map(|ratio| ratio.of_medians);
            }
        }
    }
}

impl Values {
    fn add(&mut self, round: u32, value: f64) {
        self.values.push(value);
        self.rounds.push(round);
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        self.n = sorted.len();
        self.median = if self.n.is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        self.min = sorted[0];
        self.max = sorted[self.n - 1];
    }
}

impl Metric {
    fn update(&mut self) {
        let Some(subject) = self.variants.get(SUBJECT) else { return };
        for (name, other) in self.variants.iter().filter(|(name, _)| *name != SUBJECT) {
            // The variants of a round are measured one right after the other, so passing load affects both.
            let in_round = |round: u32| {
                let index = other.rounds.iter().position(|other| *other == round)?;
                other.values.get(index)
            };
            let of_rounds = subject
                .values
                .iter()
                .zip(&subject.rounds)
                .filter_map(|(value, round)| Some(value / in_round(*round)?));
            let ratios: Vec<f64> = of_rounds.filter(|ratio| ratio.is_finite()).collect();
            let of_medians = subject.median / other.median;
            if let (Some(min), Some(max)) =
                (ratios.iter().copied().reduce(f64::min), ratios.iter().copied().reduce(f64::max))
                && of_medians.is_finite()
            {
                self.ratios.insert(name.clone(), Ratio { of_medians, min, max, baseline: None });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(metric: &str) -> Key {
        Key { group: "chain".into(), test: "notify".into(), metric: metric.into() }
    }

    fn results(pairs: &[(f64, f64)]) -> Results {
        let mut results = Results { format: FORMAT, ..Results::default() };
        for (round, (vvu, plain)) in (1..).zip(pairs) {
            results.add(round, key("kick_p50_us"), Better::Lower, "vvu", *vvu);
            results.add(round, key("kick_p50_us"), Better::Lower, "plain", *plain);
        }
        results
    }

    #[test]
    fn ratios_are_of_medians_and_spread_over_rounds() {
        let results = results(&[(30.0, 10.0), (80.0, 20.0), (20.0, 10.0)]);
        let metric = &results.results[0];
        assert_eq!((metric.variants["vvu"].n, metric.variants["vvu"].median), (3, 30.0));
        assert_eq!((metric.variants["vvu"].min, metric.variants["vvu"].max), (20.0, 80.0));
        let want = Ratio { of_medians: 3.0, min: 2.0, max: 4.0, baseline: None };
        assert_eq!(metric.ratios["plain"], want);
        assert_eq!(self::results(&[(1.0, 1.0), (2.0, 1.0)]).results[0].variants["vvu"].median, 1.5);
    }

    #[test]
    fn only_values_of_the_same_round_are_compared() {
        let mut results = results(&[(30.0, 10.0)]);
        results.add(2, key("kick_p50_us"), Better::Lower, "vvu", 1.0);
        results.add(3, key("kick_p50_us"), Better::Lower, "vvu", 20.0);
        results.add(3, key("kick_p50_us"), Better::Lower, "plain", 10.0);
        let ratio = &results.results[0].ratios["plain"];
        assert_eq!((ratio.of_medians, ratio.min, ratio.max), (2.0, 2.0, 3.0));
    }

    #[test]
    fn what_cannot_be_divided_has_no_ratio() {
        assert!(results(&[(1.0, 0.0)]).results[0].ratios.is_empty());
    }

    #[test]
    fn the_json_comes_back_and_serves_as_baseline() {
        let before = results(&[(30.0, 10.0)]);
        let text = serde_json::to_string(&before).expect("JSON");
        assert!(
            text.contains(r#""group":"chain","test":"notify","metric":"kick_p50_us","better":"lower""#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Results>(&text).expect("the same"), before);
        let mut after = results(&[(20.0, 10.0)]);
        after.add(1, key("new_us"), Better::Lower, "vvu", 1.0);
        after.compare(&before);
        assert_eq!(after.results[0].ratios["plain"].baseline, Some(3.0));
    }
}
