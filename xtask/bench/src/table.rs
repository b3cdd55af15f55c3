//! Prints the results for people.

use std::fmt::Write;

use super::results::{Metric, Results, SUBJECT};

/// The table: one line for each variant of each figure, with its ratio.
pub(super) fn text(results: &Results) -> String {
    let mut text = String::new();
    let mut group = "";
    for metric in &results.results {
        if metric.key.group != group {
            group = &metric.key.group;
            line(
                &mut text,
                format_args!("\n{group}: median [min..max], ratio of medians [smallest..largest of a round]"),
            );
        }
        rows(&mut text, metric);
    }
    for skipped in &results.skipped {
        line(&mut text, format_args!("not measured: {}: {}", skipped.what, skipped.reason));
    }
    let accelerator = results.accelerator.as_ref().map_or("none", |accelerator| &accelerator.used);
    line(
        &mut text,
        format_args!(
            "\n{} rounds of {} s, {} CPUs, load before {:?} and after {:?}, accelerator {accelerator}",
            results.rounds,
            results.seconds,
            results.machine.cpus,
            results.machine.load_before,
            results.machine.load_after
        ),
    );
    text
}

fn rows(text: &mut String, metric: &Metric) {
    let name = format!("{} {}", metric.key.test, metric.key.metric);
    for (variant, values) in &metric.variants {
        let ratio = metric.ratios.get(variant).map(|ratio| {
            let mut text = format!("{:7.2} [{:.2}..{:.2}]", ratio.of_medians, ratio.min, ratio.max);
            if let Some(before) = ratio.baseline {
                let _ =
                    write!(text, ", was {before:.2} ({:+.0} %)", (ratio.of_medians / before - 1.0) * 100.0);
            }
            format!("  {SUBJECT}:{variant} {text}")
        });
        let figures = format!("{:.2} [{:.2}..{:.2}]", values.median, values.min, values.max);
        line(text, format_args!("  {name:40} {variant:8} {figures:30}{}", ratio.unwrap_or_default()));
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // A string takes everything.
    let _ = writeln!(text, "{}", arguments.to_string().trim_end());
}
