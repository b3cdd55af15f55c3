//! Counts how often the threads of this process slept and were woken.

use std::collections::BTreeMap;
use std::fs;

/// Returns the voluntary context switches so far, by the name of the thread.
pub fn count() -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").expect("/proc").flatten() {
        // A thread may end while the directory is read.
        let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let name = field("Name").expect("a name").trim();
        let switches = field("voluntary_ctxt_switches").expect("a count").trim();
        *counts.entry(name.to_owned()).or_insert(0) += switches.parse::<u64>().expect("a number");
    }
    counts
}

/// Returns the context switches since `before`, without the threads that had none.
pub fn since(before: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let grown = |(name, count): (String, u64)| {
        let more = count.saturating_sub(before.get(&name).copied().unwrap_or(0));
        (more > 0).then_some((name, more))
    };
    count().into_iter().filter_map(grown).collect()
}
