//! The figures as an SVG, light or dark as its reader prefers.

use super::{
    figures::{Figures, Spread, rates, run_rates},
    steps::{Ends, Run},
};
use std::fmt::Write as _;
use tensorferry::{
    measure::{Ceiling, Sample},
    protocol::Durability,
};

const WIDTH: u32 = 760;
/// Bars begin here …
const LEFT: f64 = 250.0;
/// … and are this long at most; what they stand for follows.
const BAR_MAX: f64 = 330.0;
const ROW: u32 = 24;
const TITLE: u32 = 34;
const MARGIN: u32 = 16;

/// Where, what and when.
#[derive(Debug)]
pub(super) struct Caption {
    pub(super) machine: String,
    pub(super) place: String,
    pub(super) amount: String,
    pub(super) version: String,
    pub(super) date: String,
}

struct Bar {
    label: String,
    rate: Spread,
    share: Option<f64>,
    is_ours: bool,
}

struct Panel {
    title: &'static str,
    bars: Vec<Bar>,
}

/// The whole chart. Panels of which nothing was measured are left out.
pub(super) fn draw(figures: &Figures, caption: &Caption) -> String {
    let panels: Vec<Panel> = panels(figures)
        .into_iter()
        .filter(|panel| !panel.bars.is_empty())
        .collect();
    let rows: u32 = panels.iter().map(|p| p.bars.len() as u32).sum();
    let heads = panels.len() as u32;
    let height = MARGIN * 2 + 56 + heads * (TITLE + 10) + rows * ROW + 46;
    let mut out = head(height);
    let mut y = MARGIN + 22;
    text(
        &mut out,
        f64::from(MARGIN),
        y,
        "title",
        "tensorferry beside what this machine can do",
    );
    y += 20;
    text(
        &mut out,
        f64::from(MARGIN),
        y,
        "note",
        "GiB/s; thin lines run from the slowest to the fastest round; in brackets the share of the first bar",
    );
    y += 14;
    for panel in &panels {
        y += TITLE;
        text(&mut out, f64::from(MARGIN), y - 13, "panel", panel.title);
        let longest = panel.bars.iter().map(|bar| bar.rate.max);
        let scale = BAR_MAX / longest.fold(f64::MIN_POSITIVE, f64::max);
        for bar in &panel.bars {
            draw_bar(&mut out, y, bar, scale);
            y += ROW;
        }
        y += 10;
    }
    y += 16;
    let Caption {
        machine,
        place,
        amount,
        version,
        date,
    } = caption;
    let left = f64::from(MARGIN);
    text(&mut out, left, y, "note", machine);
    let end = format!("{place}; {amount}; tensorferry {version}; {date}");
    text(&mut out, left, y + 16, "note", &end);
    out += "</svg>\n";
    out
}

fn panels(figures: &Figures) -> [Panel; 3] {
    let is_disk = figures.durability == Durability::Disk;
    // The ceiling first.
    let files: &[(Ceiling, &str)] = if is_disk {
        &[
            (Ceiling::TcpFileSync, "plain TCP with fdatasync"),
            (Ceiling::TcpFile, "plain TCP, not synced"),
            (Ceiling::TcpFileCrc, "plain TCP with crc32c, not synced"),
        ]
    } else {
        &[
            (Ceiling::TcpFile, "plain TCP"),
            (Ceiling::TcpFileCrc, "plain TCP with crc32c"),
        ]
    };
    let alone = [
        (Ceiling::Crc32c, "crc32c"),
        (Ceiling::Memcpy, "copy in memory"),
        (Ceiling::Lz4Encode, "lz4, encode sparse values"),
        (Ceiling::Lz4Decode, "lz4, decode them"),
        (Ceiling::MapStore, "fresh file, map"),
        (Ceiling::MapPopulate, "fresh file, map made ahead"),
        (Ceiling::Pwrite, "fresh file, pwrite"),
        (Ceiling::Fdatasync, "write and sync"),
    ];
    [
        Panel {
            title: "File to file",
            bars: bars(figures, files, Ends::File, &[true]),
        },
        Panel {
            title: "Memory to memory, discarded",
            bars: bars(
                figures,
                &[(Ceiling::TcpMemory, "plain TCP")],
                Ends::Memory,
                &[false, true],
            ),
        },
        Panel {
            title: "One stage alone, one thread",
            bars: ceiling_bars(figures, &alone),
        },
    ]
}

fn bars(figures: &Figures, beside: &[(Ceiling, &str)], ends: Ends, crcs: &[bool]) -> Vec<Bar> {
    let mut bars = ceiling_bars(figures, beside);
    for crc in crcs {
        let runs = figures.runs.iter();
        for (run, samples) in runs.filter(|(run, _)| run.ends == ends && run.crc == *crc) {
            bars.push(Bar {
                label: run_label(*run, crcs.len() > 1),
                rate: Spread::of(run_rates(samples)),
                share: figures.share(samples, figures.ceiling_of(*run)),
                is_ours: true,
            });
        }
    }
    bars
}

fn run_label(run: Run, tells_crc: bool) -> String {
    let lanes = crate::units::count(run.lanes.into(), "lane");
    match (tells_crc, run.crc) {
        (false, _) => format!("tensorferry, {lanes}"),
        (true, true) => format!("tensorferry, {lanes}, crc"),
        (true, false) => format!("tensorferry, {lanes}, no crc"),
    }
}

fn ceiling_bars(figures: &Figures, wanted: &[(Ceiling, &str)]) -> Vec<Bar> {
    let bar = |(ceiling, label): &(Ceiling, &str)| {
        let samples: &[Sample] = figures.ceiling(*ceiling)?;
        Some(Bar {
            label: (*label).to_owned(),
            rate: Spread::of(rates(samples)),
            share: None,
            is_ours: false,
        })
    };
    wanted.iter().filter_map(bar).collect()
}

fn head(height: u32) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Throughput of tensorferry beside the ceilings of the machine">
<style>
text {{ font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }}
.card {{ fill: #ffffff; stroke: #d1d9e0; }}
.title {{ font-size: 17px; font-weight: 600; }}
.panel {{ font-weight: 600; }}
.note {{ font-size: 12px; fill: #59636e; }}
.label {{ text-anchor: end; }}
.value {{ font-variant-numeric: tabular-nums; }}
.plain {{ fill: #afb8c1; }}
.ours {{ fill: #2f7de1; }}
.range {{ stroke: #1f2328; stroke-width: 1.5; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }}
.card {{ fill: #0d1117; stroke: #30363d; }}
.note {{ fill: #9198a1; }}
.plain {{ fill: #57606a; }}
.ours {{ fill: #4c9aff; }}
.range {{ stroke: #e6edf3; }}
}}
</style>
<rect class="card" x="0.5" y="0.5" width="{}" height="{}" rx="8"/>
"##,
        WIDTH - 1,
        height - 1
    )
}

fn draw_bar(out: &mut String, y: u32, bar: &Bar, scale: f64) {
    let x = |rate: f64| LEFT + rate * scale;
    let middle = f64::from(y) + 5.0;
    text(out, LEFT - 10.0, y + 9, "label", &bar.label);
    let class = if bar.is_ours { "ours" } else { "plain" };
    let width = bar.rate.median * scale;
    // Writing into a string does not fail.
    let _ = writeln!(
        out,
        r#"<rect class="{class}" x="{LEFT}" y="{}" width="{width:.1}" height="16" rx="2"/>"#,
        f64::from(y) - 3.0
    );
    if bar.rate.max > bar.rate.min {
        let _ = writeln!(
            out,
            r#"<line class="range" x1="{:.1}" x2="{:.1}" y1="{middle}" y2="{middle}"/>"#,
            x(bar.rate.min),
            x(bar.rate.max)
        );
    }
    let mut value = format!("{:.2}", bar.rate.median);
    if let Some(share) = bar.share {
        value += &format!(" ({share:.2})");
    }
    text(
        out,
        x(bar.rate.max.max(bar.rate.median)) + 8.0,
        y + 9,
        "value",
        &value,
    );
}

fn text(out: &mut String, x: f64, y: u32, class: &str, words: &str) {
    let _ = writeln!(
        out,
        r#"<text class="{class}" x="{x:.1}" y="{y}">{}</text>"#,
        escape(words)
    );
}

/// Text of the machine's own may hold anything; XML takes no control characters.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{super::figures::tests::figures, *};

    fn caption() -> Caption {
        Caption {
            machine: "a <fast> & \"small\" one\u{7}".to_owned(),
            place: "tmpfs, durability process".to_owned(),
            amount: "1.0 GiB".to_owned(),
            version: "0".to_owned(),
            date: "2026-11-22".to_owned(),
        }
    }

    /// Every element is closed by its own name, and what stands between is text.
    fn check_elements(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some((text, after)) = rest.split_once('<') {
            assert!(
                !text.contains('>') || open.last() == Some(&"style"),
                "{text}"
            );
            let (tag, after) = after.split_once('>').unwrap();
            let quotes = tag.matches('"').count();
            assert!(quotes.is_multiple_of(2), "{tag}");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None if tag.ends_with('/') => {}
                None => open.push(tag.split(' ').next().unwrap()),
            }
            rest = after;
        }
        assert!(open.is_empty() && rest.trim().is_empty());
    }

    #[test]
    fn a_chart_is_well_formed_and_names_the_machine_and_the_day() {
        let svg = draw(&figures(&[0.5, 0.6, 0.7]), &caption());
        check_elements(&svg);
        for words in [
            "a &lt;fast&gt; &amp; &quot;small&quot; one ",
            "2026-11-22",
            "prefers-color-scheme",
        ] {
            assert!(svg.contains(words), "{words}");
        }
        // 3 lanes in one panel, 6 runs in the other.
        assert_eq!(svg.matches(r#"class="ours""#).count(), 9);
        assert_eq!(svg.matches("(0.50)").count(), 9);
    }

    #[test]
    fn bars_are_as_long_as_their_rates_and_within_the_picture() {
        let svg = draw(&figures(&[0.5]), &caption());
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| line.starts_with("<rect class=\"ours\"") || line.contains("\"plain\""))
            .map(|line| {
                line.split("width=\"")
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
            })
            .map(|width| width.parse().unwrap())
            .collect();
        assert!(widths.contains(&BAR_MAX) && widths.contains(&(BAR_MAX / 2.0)));
        assert!(widths.iter().all(|width| *width <= BAR_MAX));
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        let mut few = figures(&[0.5]);
        few.runs.clear();
        few.ceilings
            .retain(|(ceiling, _)| *ceiling == Ceiling::TcpMemory);
        let svg = draw(&few, &caption());
        check_elements(&svg);
        assert!(!svg.contains("File to file") && !svg.contains(r#"class="ours""#));
        assert_eq!(svg.matches(r#"class="plain""#).count(), 1);
    }
}
