//! The `tojson` filter of chat templates: what Python's `json.dumps(x, ensure_ascii=False)` writes, to the byte.
//!
//! minijinja's own filter writes compact JSON with HTML escapes, which would be other tokens.

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};
use std::io::{self, Write};

/// The widest indent that is honoured.
const MAX_INDENT: usize = 16;

/// `value | tojson(ensure_ascii=false, indent=none, sort_keys=false)`.
pub(super) fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let indent: Option<usize> = options.get("indent")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "separators must be a pair",
            ));
        }
        None if indent.is_some() => [",".into(), ": ".into()],
        None => [", ".into(), ": ".into()],
    };
    let failed = |e: serde_json::Error| {
        Error::new(ErrorKind::InvalidOperation, "cannot serialize to JSON").with_source(e)
    };
    let mut json = serde_json::to_value(&value).map_err(failed)?;
    if sort == Some(true) {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    let style = Python {
        item,
        key,
        indent: indent.map(|n| n.min(MAX_INDENT)),
        depth: 0,
        filled: false,
        ascii: ascii == Some(true),
    };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, style))
        .map_err(failed)?;
    String::from_utf8(out).map_err(|_| Error::new(ErrorKind::InvalidOperation, "cannot serialize to JSON"))
}

/// Python's layout.
struct Python {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    /// Whether the container just left had anything in it: an empty one stays on its line.
    filled: bool,
    ascii: bool,
}

impl Python {
    fn line<W: ?Sized + Write>(&self, w: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(w, "\n{:1$}", "", indent * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        w.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(w)?;
        }
        self.filled = true;
        w.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        self.filled = true;
        self.line(w)
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }
    fn write_f64<W: ?Sized + Write>(&mut self, w: &mut W, value: f64) -> io::Result<()> {
        w.write_all(python_float(value).as_bytes())
    }
    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, text: &str) -> io::Result<()> {
        if !self.ascii {
            return w.write_all(text.as_bytes());
        }
        let mut units = [0; 2];
        for c in text.chars() {
            match c {
                ' '..='~' => write!(w, "{c}")?,
                _ => {
                    for unit in c.encode_utf16(&mut units) {
                        write!(w, "\\u{unit:04x}")?;
                    }
                }
            }
        }
        Ok(())
    }
    fn write_char_escape<W: ?Sized + Write>(&mut self, w: &mut W, escape: CharEscape) -> io::Result<()> {
        serde_json::ser::CompactFormatter.write_char_escape(w, escape)
    }
}

/// Python's `repr` of a float: exponents below -4 and from 16 on are written out.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    match (-4..16).contains(&exponent) {
        true => format!("{value:?}"),
        false => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
    }
}

#[cfg(test)]
mod tests {
    /// What CPython 3.11 prints for `json.dumps(x, ensure_ascii=False, …)`.
    #[test]
    fn writes_what_python_writes() {
        let mut env = minijinja::Environment::new();
        env.add_filter("tojson", super::tojson);
        let check = |expression: &str, expect: &str| {
            let x = serde_json::json!({"b": [1, 2.0, 1e-5, 1e16, 1e22, null, true], "a": {"é": "<&'\"\n"}, "e": [], "o": {}});
            let found = env.render_str(&format!("{{{{ {expression} }}}}"), minijinja::context!(x));
            assert_eq!(found.unwrap(), expect, "{expression}");
        };
        check(
            "x | tojson",
            r#"{"b": [1, 2.0, 1e-05, 1e+16, 1e+22, null, true], "a": {"é": "<&'\"\n"}, "e": [], "o": {}}"#,
        );
        check("x.a | tojson(ensure_ascii=true)", r#"{"\u00e9": "<&'\"\n"}"#);
        check("x.e | tojson(indent=2)", "[]");
        check(
            "[1, [], {}, [2]] | tojson(indent=2)",
            "[\n  1,\n  [],\n  {},\n  [\n    2\n  ]\n]",
        );
        check("{'b': 1, 'a': 2} | tojson(sort_keys=true)", r#"{"a": 2, "b": 1}"#);
        check("[1, 2] | tojson(separators=[',', ':'])", "[1,2]");
    }
}
