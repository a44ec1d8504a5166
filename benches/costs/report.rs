//! `docs/performance.md` and its charts.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use plotters::prelude::*;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The smallest and the largest of the measurements of one thing.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Range {
    pub(crate) fn of(measured: &[f64]) -> Self {
        Self {
            low: measured.iter().copied().fold(f64::INFINITY, f64::min),
            high: measured.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// A count, which is the same each time.
    pub(crate) fn exactly(count: f64) -> Self {
        Self::of(&[count])
    }

    fn middle(self) -> f64 {
        f64::midpoint(self.low, self.high)
    }

    /// Three significant digits, or whole from 1,000 on.
    fn number(value: f64) -> String {
        match value.abs() {
            0.0..10.0 => format!("{value:.2}"),
            10.0..100.0 => format!("{value:.1}"),
            _ => {
                let digits = format!("{value:.0}");
                let mut grouped = String::new();
                for (n, digit) in digits.chars().enumerate() {
                    if n > 0 && (digits.len() - n) % 3 == 0 {
                        grouped.push(',');
                    }
                    grouped.push(digit);
                }
                grouped
            }
        }
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (low, high) = (Self::number(self.low), Self::number(self.high));
        if low == high {
            f.write_str(&low)
        } else {
            write!(f, "{low} to {high}")
        }
    }
}

/// One subject: a title, what it shows, a table and a chart.
pub(crate) struct Section {
    /// Names the chart's file.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) text: String,
    pub(crate) unit: &'static str,
    /// Bars, or the points of a line each, by the first column.
    pub(crate) rows: Vec<(String, Range)>,
}

impl Section {
    fn markdown(&self) -> Result<String> {
        let Self {
            name,
            title,
            unit,
            text,
            rows,
        } = self;
        let mut page = String::new();
        writeln!(
            page,
            "## {title}\n\n{text}\n\n![{title}](performance/{name}.svg)\n"
        )?;
        writeln!(page, "| | {unit} | ratio |\n| --- | ---: | ---: |")?;
        for (label, range) in rows {
            let ratio = range.middle() / rows[0].1.middle();
            writeln!(page, "| {label} | {range} | {} |", Range::number(ratio))?;
        }
        page.push('\n');
        Ok(page)
    }

    /// Horizontal bars with the label before and the range behind each.
    fn svg(&self) -> Result<String> {
        const ROW: i32 = 26;
        const LABELS: i32 = 330;
        const BARS: i32 = 330;
        let count = i32::try_from(self.rows.len())?;
        let size = (800, u32::try_from(ROW * count + 60)?);
        let largest = self.rows.iter().map(|row| row.1.high).fold(0.0, f64::max);
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            area.fill(&WHITE)?;
            let text = |size: i32| ("sans-serif", size).into_font();
            let title = format!("{}, {}", self.title, self.unit);
            area.draw(&Text::new(title, (12, 14), text(16)))?;
            for (n, (label, range)) in (0..).zip(&self.rows) {
                let top = 46 + ROW * n;
                #[expect(clippy::cast_possible_truncation, reason = "pixels of the picture")]
                let x = |value: f64| LABELS + (f64::from(BARS) * value / largest) as i32;
                let bar = [(LABELS, top), (x(range.middle()), top + ROW - 10)];
                area.draw(&Rectangle::new(bar, RGBColor(70, 110, 170).filled()))?;
                let middle = top + (ROW - 10) / 2;
                let whisker = vec![(x(range.low), middle), (x(range.high), middle)];
                area.draw(&PathElement::new(whisker, BLACK.stroke_width(2)))?;
                area.draw(&Text::new(label.clone(), (12, top + 1), text(13)))?;
                let behind = (x(range.high) + 8, top + 1);
                area.draw(&Text::new(range.to_string(), behind, text(13)))?;
            }
            area.present()?;
        }
        Ok(svg)
    }
}

/// The page: the sections of this run, and those of earlier ones that are kept.
pub(crate) struct Report {
    intro: String,
    /// By title.
    sections: Vec<(String, String)>,
    charts: Vec<(&'static str, String)>,
}

impl Report {
    pub(crate) fn new(intro: String) -> Self {
        Self {
            intro,
            sections: Vec::new(),
            charts: Vec::new(),
        }
    }

    /// Keeps the sections of the page as it is, unless this run adds them again.
    pub(crate) fn keep(&mut self) -> Result {
        let page = fs::read_to_string(docs().join("performance.md"))?;
        for section in page.split("\n## ").skip(1) {
            let title = section.lines().next().unwrap_or_default();
            let text = format!("## {}\n\n", section.trim_end());
            self.sections.push((title.to_owned(), text));
        }
        Ok(())
    }

    pub(crate) fn add(&mut self, section: Section) -> Result {
        println!("{}", section.title);
        for (label, range) in &section.rows {
            println!("  {label:<56} {range} {}", section.unit);
        }
        let text = section.markdown()?;
        match self
            .sections
            .iter_mut()
            .find(|kept| kept.0 == section.title)
        {
            Some(kept) => kept.1 = text,
            None => self.sections.push((section.title.to_owned(), text)),
        }
        self.charts.push((section.name, section.svg()?));
        Ok(())
    }

    pub(crate) fn write(&self) -> Result {
        let docs = docs();
        fs::create_dir_all(docs.join("performance"))?;
        for (name, chart) in &self.charts {
            fs::write(docs.join(format!("performance/{name}.svg")), chart)?;
        }
        let mut page = format!("# Performance\n\n{}\n\n", self.intro);
        page.extend(self.sections.iter().map(|section| &*section.1));
        fs::write(
            docs.join("performance.md"),
            page.trim_end().to_owned() + "\n",
        )?;
        Ok(())
    }
}

fn docs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs")
}
