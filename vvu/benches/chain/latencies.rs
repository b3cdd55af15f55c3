//! The result of a test.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// Times of one kind of event, in nanoseconds.
#[derive(Debug, Default)]
pub struct Latencies(Vec<u64>);

impl Latencies {
    pub fn add(&mut self, time: Duration) {
        self.0.push(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Returns the time in microseconds that `percent` of the events do not exceed, 0 if there are no events.
    pub fn percentile(&mut self, percent: usize) -> f64 {
        self.0.sort_unstable();
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).map_or(0.0, |nanoseconds| Duration::from_nanos(*nanoseconds).as_secs_f64() * 1e6)
    }
}

/// What a test came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub operations: u64,
    pub elapsed: Duration,
    pub latencies: BTreeMap<&'static str, Latencies>,
    /// Number of times that the threads of each name slept and were woken.
    pub wake_ups: BTreeMap<String, u64>,
}

impl Outcome {
    #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    pub fn into_json(mut self) -> Value {
        let operations = self.operations.max(1) as f64;
        let mut value = Map::new();
        value.insert("operations".to_owned(), json!(self.operations));
        value.insert("per_second".to_owned(), json!(operations / self.elapsed.as_secs_f64()));
        for (name, times) in &mut self.latencies {
            for percent in [50, 99] {
                value.insert(format!("{name}_p{percent}_us"), json!(times.percentile(percent)));
            }
        }
        let wake_ups = self.wake_ups.iter().map(|(name, count)| (name.clone(), *count as f64 / operations));
        value.insert("wake_ups_per_operation".to_owned(), json!(wake_ups.collect::<BTreeMap<_, _>>()));
        Value::Object(value)
    }
}
