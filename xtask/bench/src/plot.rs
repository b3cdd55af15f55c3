//! Draws the ratios as an SVG bar plot.

use std::fmt::Write;

use super::results::{Better, Ratio, Results, SUBJECT};

const LABELS: f64 = 460.0;
const PLOT: f64 = 480.0;
const FIGURES: f64 = 150.0;
const ROW: f64 = 20.0;
const TOP: f64 = 48.0;
/// The axis goes from 1/32 to 32 in powers of two.
const POWERS: i32 = 5;

/// Draws one bar for each ratio on a logarithmic axis; it points right where VVU is better.
pub(super) fn svg(results: &Results) -> String {
    let rows: Vec<(String, Better, &Ratio)> = results
        .results
        .iter()
        // Single system calls would crowd out the rest.
        .filter(|metric| !metric.key.metric.ends_with("_calls") || metric.key.metric == "system_calls")
        .flat_map(|metric| {
            let key = &metric.key;
            let label = move |other: &str| format!("{} {} {} : {other}", key.group, key.test, key.metric);
            metric.ratios.iter().map(move |(other, ratio)| (label(other), metric.better, ratio))
        })
        .collect();
    let bottom = TOP + row_top(rows.len());
    let mut svg = String::new();
    let (width, height) = (LABELS + PLOT + FIGURES, bottom + 24.0);
    line(
        &mut svg,
        format_args!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">"#
        ),
    );
    line(&mut svg, format_args!(r##"<rect width="100%" height="100%" fill="#fff"/>"##));
    line(
        &mut svg,
        format_args!(
            r#"<text x="8" y="20" font-size="15">{SUBJECT} against others: right of 1 is better</text>"#
        ),
    );
    for power in -POWERS..=POWERS {
        let x = position(2f64.powi(power));
        let color = if power == 0 { "#333" } else { "#ddd" };
        let label = if power < 0 { format!("1/{}", 1 << -power) } else { (1 << power).to_string() };
        line(
            &mut svg,
            format_args!(r#"<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="{color}"/>"#),
        );
        line(
            &mut svg,
            format_args!(r#"<text x="{x}" y="{}" text-anchor="middle">{label}</text>"#, TOP - 6.0),
        );
    }
    for (index, (label, better, ratio)) in rows.iter().enumerate() {
        row(&mut svg, TOP + row_top(index), label, *better, ratio);
    }
    svg.push_str("</svg>\n");
    svg
}

fn row(svg: &mut String, top: f64, label: &str, better: Better, ratio: &Ratio) {
    // How many times better.
    let speed = |ratio: f64| if better == Better::Higher { ratio } else { 1.0 / ratio };
    let (one, value) = (position(1.0), position(speed(ratio.of_medians)));
    let (left, right) = (one.min(value), one.max(value));
    let (low, high) = (position(speed(ratio.min)), position(speed(ratio.max)));
    let color = if value < one { "#c96a3d" } else { "#3d8bc9" };
    let (middle, text) = (top + ROW / 2.0, top + ROW / 2.0 + 4.0);
    line(svg, format_args!(r#"<text x="{}" y="{text}" text-anchor="end">{label}</text>"#, LABELS - 8.0));
    line(
        svg,
        format_args!(
            r#"<rect x="{left:.1}" y="{}" width="{:.1}" height="{}" fill="{color}"/>"#,
            top + 3.0,
            right - left,
            ROW - 6.0
        ),
    );
    line(
        svg,
        format_args!(r##"<line x1="{low:.1}" y1="{middle}" x2="{high:.1}" y2="{middle}" stroke="#000"/>"##),
    );
    line(
        svg,
        format_args!(
            r#"<text x="{}" y="{text}">{:.2} [{:.2}..{:.2}]</text>"#,
            LABELS + PLOT + 8.0,
            ratio.of_medians,
            ratio.min,
            ratio.max
        ),
    );
}

#[expect(clippy::cast_precision_loss, reason = "a plot has few rows")]
fn row_top(rows: usize) -> f64 {
    rows as f64 * ROW
}

/// The horizontal position of a ratio; a ratio beyond the axis is at its end.
fn position(ratio: f64) -> f64 {
    let most = f64::from(POWERS);
    LABELS + (ratio.log2().clamp(-most, most) + most) / (2.0 * most) * PLOT
}

fn line(svg: &mut String, arguments: std::fmt::Arguments<'_>) {
    // A string takes everything.
    let _ = writeln!(svg, "{arguments}");
}

#[cfg(test)]
mod tests {
    use super::super::results::Key;
    use super::*;

    #[test]
    fn every_ratio_has_a_bar_on_its_side_of_one() {
        let mut results = Results::default();
        for (metric, better, vvu) in [("slow_us", Better::Lower, 4.0), ("per_second", Better::Higher, 2.0)] {
            let key = Key { group: "chain".into(), test: "t".into(), metric: metric.into() };
            results.add(1, key.clone(), better, "vvu", vvu);
            results.add(1, key, better, "plain", 1.0);
        }
        let svg = svg(&results);
        assert_eq!(svg.matches("chain t ").count(), 2);
        assert_eq!((svg.matches("#c96a3d").count(), svg.matches("#3d8bc9").count()), (1, 1), "{svg}");
        assert!((position(1e9) - (LABELS + PLOT)).abs() < 1e-9);
        assert!((position(0.0) - LABELS).abs() < 1e-9);
    }
}
