//! Line plots as SVG: what `fathom runs` and `fathom sweep` draw.

use std::fmt::Write as _;

use super::compare::Spread;

/// A line with its name; points are a place on the x axis, from 0 to 1, and a value with its band.
/// Values that are not finite are left out.
pub struct Line {
    /// What the legend calls it.
    pub name: String,
    /// Points in ascending order of their places on the x axis.
    pub points: Vec<(f64, Spread)>,
}

/// The x axis.
pub struct Axis {
    /// What the axis shows, written below it.
    pub label: String,
    /// Places on the axis, from 0 to 1, and the text at each.
    pub ticks: Vec<(f64, String)>,
}

/// Lines of the picture: readable on white and on dark ground, and apart for colour-blind readers.
const COLOURS: [&str; 7] =
    ["#2a78d6", "#c2571a", "#1a8f6b", "#8a5cc9", "#b98a00", "#c43d7a", "#6b7280"];
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 16.0;
/// Room for the legend.
const RIGHT: f64 = 190.0;
const PLOT_WIDTH: f64 = WIDTH - LEFT - RIGHT;
const PLOT_HEIGHT: f64 = HEIGHT - TOP - 44.0;
/// Points up to which a line shows each of them.
const FEW: usize = 24;

/// The lines as SVG, each in a band from its smallest to its largest values.
pub fn svg(lines: &[Line], axis: &Axis, label: &str) -> String {
    let finite = || lines.iter().flat_map(|l| &l.points).filter(|p| p.1.mean.is_finite());
    let low = finite().map(|p| p.1.min).fold(f64::INFINITY, f64::min);
    let high = finite().map(|p| p.1.max).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    let tick = tick(high - low);
    let (low, high) = ((low / tick).floor() * tick, (high / tick).ceil() * tick);
    let x = |place: f64| LEFT + PLOT_WIDTH * place;
    let y = |value: f64| TOP + PLOT_HEIGHT * (high - value) / (high - low);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n<style>\
         .ground{{fill:#ffffff}}.ink{{fill:#24292f}}.grid{{stroke:#d0d7de}}\
         @media(prefers-color-scheme:dark){{.ground{{fill:#0d1117}}.ink{{fill:#c9d1d9}}\
         .grid{{stroke:#30363d}}}}</style>\n\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    grid(&mut out, (low, high, tick), axis, label);
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points = |of: fn(&Spread) -> f64| {
            let all = line.points.iter().filter(|p| p.1.mean.is_finite());
            all.map(|(place, s)| format!("{:.1},{:.1}", x(*place), y(of(s)))).collect::<Vec<_>>()
        };
        let mut band = points(|s| s.max);
        band.extend(points(|s| s.min).into_iter().rev());
        let (band, means) = (band.join(" "), points(|s| s.mean));
        let _ = write!(
            out,
            "<g><title>{name}</title><polygon points=\"{band}\" fill=\"{colour}\" \
             opacity=\"0.15\"/><polyline points=\"{line}\" fill=\"none\" stroke=\"{colour}\" \
             stroke-width=\"1.6\"/>",
            name = escape(&line.name),
            line = means.join(" ")
        );
        for point in means.iter().filter(|_| line.points.len() <= FEW) {
            let (cx, cy) = point.split_once(',').expect("just written");
            let _ = write!(out, "<circle cx=\"{cx}\" cy=\"{cy}\" r=\"3\" fill=\"{colour}\"/>");
        }
        out.push_str("</g>\n");
    }
    legend(&mut out, lines);
    out.push_str("</svg>\n");
    out
}

/// Distance of grid lines: 1, 2 or 5 times a power of ten, some six over `range`.
pub(super) fn tick(range: f64) -> f64 {
    let rough = range / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|t| t * power).find(|&t| t >= rough).unwrap_or(power)
}

fn grid(out: &mut String, (low, high, every): (f64, f64, f64), axis: &Axis, label: &str) {
    let lines = ((high - low) / every).round() as usize;
    let digits = if every < 1.0 { (-every.log10().floor()) as usize } else { 0 };
    let right = LEFT + PLOT_WIDTH;
    for i in 0..=lines {
        let value = low + i as f64 * every;
        let y = TOP + PLOT_HEIGHT * (high - value) / (high - low);
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"ink\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value:.digits$}</text>",
            LEFT - 8.0,
            y + 4.0
        );
    }
    for (place, text) in &axis.ticks {
        let _ = writeln!(
            out,
            "<text class=\"ink\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            LEFT + PLOT_WIDTH * place,
            TOP + PLOT_HEIGHT + 18.0,
            escape(text)
        );
    }
    let (middle, centre) = (LEFT + PLOT_WIDTH / 2.0, TOP + PLOT_HEIGHT / 2.0);
    let _ = writeln!(
        out,
        "<text class=\"ink\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
         <text class=\"ink\" x=\"14\" y=\"{centre}\" text-anchor=\"middle\" \
         transform=\"rotate(-90 14 {centre})\">{}</text>",
        HEIGHT - 6.0,
        escape(&axis.label),
        escape(label)
    );
}

fn legend(out: &mut String, lines: &[Line]) {
    for (i, (line, colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let (x, y) = (LEFT + PLOT_WIDTH + 16.0, TOP + 12.0 + 20.0 * i as f64);
        let _ = writeln!(
            out,
            "<line x1=\"{x}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"{colour}\" \
             stroke-width=\"3\"/><text class=\"ink\" x=\"{}\" y=\"{}\">{}</text>",
            x + 18.0,
            x + 24.0,
            y + 4.0,
            escape(&line.name)
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
