//! The host's resources that processes use.

use std::fs;
use std::iter::Sum;

/// Microseconds of a clock tick in /proc; x86-64 has 100 ticks in a second.
const TICK_US: f64 = 10_000.0;

/// Usage summed over the threads of processes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Usage {
    /// Processor time in microseconds.
    pub(super) cpu_us: f64,
    /// How often a thread slept and was woken.
    pub(super) wake_ups: f64,
}

impl Usage {
    /// The usage of a process so far; zero if it has ended.
    pub(super) fn of(process: u32) -> Self {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let mut usage = Self { cpu_us: ticks(&stat) * TICK_US, wake_ups: 0.0 };
        for task in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            usage.wake_ups += switches(&status);
        }
        usage
    }

    /// The usage since `before`; at least 0, since the wake-ups of a thread that ends are no longer counted.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            cpu_us: (self.cpu_us - before.cpu_us).max(0.0),
            wake_ups: (self.wake_ups - before.wake_ups).max(0.0),
        }
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            cpu_us: sum.cpu_us + one.cpu_us,
            wake_ups: sum.wake_ups + one.wake_ups,
        })
    }
}

/// The sum of utime and stime, fields 14 and 15. Field 2 is a name in parentheses, which may contain anything.
fn ticks(stat: &str) -> f64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<f64>().ok()).sum()
}

fn switches(status: &str) -> f64 {
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0.0)
}

/// The sum of all counts in lines of /proc/interrupts: a name, a count for each CPU, and words about the interrupt.
pub(super) fn interrupts(lines: &str) -> f64 {
    let counts = |line: &str| {
        let words: Vec<_> = line.split_whitespace().skip(1).map(str::parse::<u32>).collect();
        words.into_iter().map_while(Result::ok).map(f64::from).sum::<f64>()
    };
    lines.lines().map(counts).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_proc_are_found() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 100";
        assert_eq!(ticks(stat), 300.0);
        assert_eq!(ticks(""), 0.0);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t4\n";
        assert_eq!(switches(status), 17.0);
    }

    #[test]
    fn the_interrupts_of_all_cpus_are_counted() {
        let lines = " 24:   100    7  PCI-MSIX-0000:00:05.0   1-edge  virtio0-req.0\n 25: 1 0  PCI-MSIX 9 virtio0-req.1\n";
        assert_eq!(interrupts(lines), 108.0);
        assert_eq!(interrupts(""), 0.0);
    }

    #[test]
    fn this_process_uses_something() {
        let this = Usage::of(std::process::id());
        let later = Usage::of(std::process::id());
        assert!(later.cpu_us >= this.cpu_us);
        assert_eq!(this.since(later).cpu_us, 0.0);
    }
}
