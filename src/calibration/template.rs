//! The chat template of a checkpoint, rendered as transformers renders it.
//!
//! Owns the search for the template, its dialect and its limits. It must not know where conversations come from.
//!
//! Two departures, so that equal inputs give equal bytes and nothing is lost: `strftime_now` tells a fixed day (the one
//! that Llama 3.1's template names itself), and a template that does not know tool calls or a system turn is given their
//! text in a turn that it knows.

use super::conversation::{Conversation, Reason, Role, Turn};
use super::files::{read_json, read_small};
use super::tojson::tojson;
use crate::error::{Error, Result};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The longest template that is taken.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Instructions a template may run for one conversation.
const MAX_INSTRUCTIONS: u64 = 20_000_000;
/// What a template may write for one conversation.
const MAX_RENDERED_BYTES: usize = 64 << 20;
/// Of an error message of the template, what stands in the report.
const MAX_REASON_CHARS: usize = 120;
/// The named template that transformers takes where tools are offered.
const TOOL_TEMPLATE: &str = "tool_use";
const DEFAULT_TEMPLATE: &str = "default";

/// A chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// bos_token, eos_token, … by name.
    special_tokens: Map<String, Value>,
    traits: Vec<(String, Traits)>,
}

/// What a template was seen to understand.
#[derive(Clone, Copy, Debug)]
struct Traits {
    /// Content must be a list of parts: some multimodal templates lose plain strings.
    parts: bool,
    tool_calls: bool,
    tool_role: bool,
    tools: bool,
}

/// A rendered conversation, and what the template could not say as it stood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The system text stands in the first user turn, since the template takes none.
    pub system_folded: bool,
    /// Tools were on offer which the template does not render.
    pub tools_unused: bool,
}

impl ChatTemplate {
    /// Finds the template in `model_dir`: `chat_template.jinja`, else `chat_template.json`, else `tokenizer_config.json`.
    /// `None` if the model has none.
    pub fn open(model_dir: &Path) -> Result<Option<Self>> {
        let path = model_dir.join("tokenizer_config.json");
        let config = read_json(&path)?.unwrap_or(Value::Null);
        let jinja = model_dir.join("chat_template.jinja");
        if let Some(bytes) = read_small(&jinja, MAX_TEMPLATE_BYTES)? {
            let source = String::from_utf8(bytes).map_err(|_| {
                Error::invalid(jinja.display().to_string(), "not UTF-8 text", "fetch it again")
            })?;
            return Self::new(&Value::from(source), &config, &jinja).map(Some);
        }
        let processor = model_dir.join("chat_template.json");
        if let Some(json) = read_json(&processor)?
            && let Some(template) = json.get("chat_template")
        {
            return Self::new(template, &config, &processor).map(Some);
        }
        match config.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(template) => Self::new(template, &config, &path).map(Some),
        }
    }

    /// Compiles a template: its source, or a list of `{name, template}`. `config` is the tokenizer's, for its special
    /// tokens; `origin` is named in errors.
    pub fn new(template: &Value, config: &Value, origin: &Path) -> Result<Self> {
        let bad = |problem: String| {
            Error::invalid(
                origin.display().to_string(),
                problem,
                "fetch the file again, or calibrate with plain text, which needs no chat template",
            )
        };
        let sources: Vec<(String, String)> = match template {
            Value::String(source) => vec![(DEFAULT_TEMPLATE.into(), source.clone())],
            Value::Array(named) => named
                .iter()
                .filter_map(|entry| {
                    let text = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                    Some((text("name")?, text("template")?))
                })
                .collect(),
            Value::Object(named) => named
                .iter()
                .filter_map(|(name, source)| Some((name.clone(), source.as_str()?.to_owned())))
                .collect(),
            _ => Vec::new(),
        };
        if !sources.iter().any(|(name, _)| name == DEFAULT_TEMPLATE) {
            return Err(bad(
                "chat_template is neither text nor has one called default".into()
            ));
        }
        let mut this = Self {
            environment: environment(),
            special_tokens: special_tokens(config),
            traits: Vec::new(),
        };
        for (name, source) in sources {
            if source.len() as u64 > MAX_TEMPLATE_BYTES {
                return Err(bad(format!(
                    "the chat template is longer than {MAX_TEMPLATE_BYTES} bytes"
                )));
            }
            this.environment
                .add_template_owned(name.clone(), without_generation_tags(&source))
                .map_err(|e| bad(format!("the chat template does not compile: {e}")))?;
            let quoted =
                |word| source.contains(&format!("'{word}'")) || source.contains(&format!("\"{word}\""));
            let mut traits = Traits {
                parts: false,
                tool_calls: source.contains("tool_calls"),
                tool_role: quoted("tool"),
                tools: source.contains("tools"),
            };
            traits.parts = this.wants_parts(&name, traits);
            this.traits.push((name, traits));
        }
        Ok(this)
    }

    /// Whether a plain string is lost or refused where a list of parts is not.
    fn wants_parts(&self, name: &str, traits: Traits) -> bool {
        let shows = |parts| {
            let turns = [
                Turn::new(Role::User, "qfask"),
                Turn::new(Role::Assistant, "qfsay"),
            ];
            let turns: Vec<_> = turns
                .iter()
                .map(|t| message(t, Traits { parts, ..traits }))
                .collect();
            let text = self.run(name, turns, &[]);
            text.is_ok_and(|text| text.contains("qfask") && text.contains("qfsay"))
        };
        !shows(false) && shows(true)
    }

    /// Renders a conversation without a generation prompt, or says why the template does not take it.
    pub fn render(&self, conversation: &Conversation) -> Result<Rendered, Reason> {
        let tools = &conversation.tools;
        let of_name = |wanted: &str| self.traits.iter().find(|(name, _)| name == wanted);
        let chosen = match tools.is_empty() {
            true => None,
            false => of_name(TOOL_TEMPLATE),
        };
        let Some((name, traits)) = chosen.or_else(|| of_name(DEFAULT_TEMPLATE)) else {
            return Err("the chat template is missing".into());
        };
        let messages = |turns: &[Turn]| turns.iter().map(|t| message(t, *traits)).collect();
        let tools_unused = !tools.is_empty() && !traits.tools;
        let refused = match self.run(name, messages(&conversation.turns), tools) {
            Ok(text) => {
                return Ok(Rendered {
                    text,
                    system_folded: false,
                    tools_unused,
                });
            }
            Err(refused) => refused,
        };
        // Templates without a system turn refuse it (Gemma); its text then opens the first user turn.
        if let [system, first, rest @ ..] = conversation.turns.as_slice()
            && system.role == Role::System
        {
            let first = Turn {
                text: format!("{}\n\n{}", system.text, first.text),
                ..first.clone()
            };
            let turns: Vec<_> = std::iter::once(first).chain(rest.iter().cloned()).collect();
            if let Ok(text) = self.run(name, messages(&turns), tools) {
                return Ok(Rendered {
                    text,
                    system_folded: true,
                    tools_unused,
                });
            }
        }
        Err(refused)
    }

    fn run(&self, name: &str, messages: Vec<Value>, tools: &[Value]) -> Result<String, Reason> {
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), messages.into());
        context.insert(
            "tools".into(),
            if tools.is_empty() {
                Value::Null
            } else {
                tools.into()
            },
        );
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), false.into());
        let refuse = |e: minijinja::Error| {
            let detail = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            let detail: String = detail.chars().take(MAX_REASON_CHARS).collect();
            Reason::from(format!("the chat template refuses it: {detail}"))
        };
        let template = self.environment.get_template(name).map_err(refuse)?;
        let mut out = Limited(Vec::new());
        template.render_captured_to(context, &mut out).map_err(refuse)?;
        String::from_utf8(out.0).map_err(|_| "the chat template writes no text".into())
    }
}

/// A turn as templates expect a message.
fn message(turn: &Turn, traits: Traits) -> Value {
    let mut message = Map::new();
    let mut text = turn.text.clone();
    let role = match turn.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant | Role::FunctionCall => "assistant",
        Role::Observation if traits.tool_role => "tool",
        Role::Observation => "user",
    };
    message.insert("role".into(), role.into());
    let mut extra = turn.extra.clone();
    if turn.role == Role::FunctionCall
        && traits.tool_calls
        && let Some(calls) = function_calls(&text)
    {
        extra.insert("tool_calls".into(), calls);
        text.clear();
    }
    if !traits.tool_calls
        && let Some(calls) = extra.remove("tool_calls")
        && text.is_empty()
    {
        text = calls.to_string();
    }
    let content = match traits.parts {
        true => json!([{"type": "text", "text": text}]),
        false => text.into(),
    };
    message.insert("content".into(), content);
    message.extend(extra);
    Value::Object(message)
}

/// LLaMA-Factory's function call text, one call or a list, as `tool_calls`.
fn function_calls(text: &str) -> Option<Value> {
    let parsed: Value = serde_json::from_str(text).ok()?;
    let calls = match parsed {
        Value::Array(calls) => calls,
        one => vec![one],
    };
    let calls = calls.into_iter().map(|call| {
        let name = call.get("name")?.as_str()?;
        let arguments = match call.get("arguments")? {
            Value::String(text) => serde_json::from_str(text).ok()?,
            other => other.clone(),
        };
        Some(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
    });
    let calls: Option<Vec<Value>> = calls.collect();
    calls.filter(|calls| !calls.is_empty()).map(Value::from)
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<String, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| fixed_day(&format));
    environment
}

/// `strftime` of Friday, 26 July 2024, 00:00:00.
fn fixed_day(format: &str) -> String {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        if code == Some('-') {
            code = chars.next();
        }
        out.push_str(match code {
            Some('Y') => "2024",
            Some('y') => "24",
            Some('m') => "07",
            Some('d' | 'e') => "26",
            Some('B') => "July",
            Some('b' | 'h') => "Jul",
            Some('A') => "Friday",
            Some('a') => "Fri",
            Some('j') => "208",
            Some('H' | 'M' | 'S') => "00",
            Some('I') => "12",
            Some('p') => "AM",
            Some('F') => "2024-07-26",
            Some('T') => "00:00:00",
            Some('%') => "%",
            _ => "",
        });
    }
    out
}

/// The special tokens of tokenizer_config.json, each a string or `{"content": …}`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let mut found = Map::new();
    let entries = config.as_object().into_iter().flatten();
    for (key, value) in entries.filter(|(key, _)| key.ends_with("_token")) {
        let content = value.as_str().or_else(|| value.get("content")?.as_str());
        if let Some(content) = content {
            found.insert(key.clone(), content.into());
        }
    }
    found
}

/// `{% generation %}` marks the assistant's tokens for transformers and writes nothing: a block that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}") else {
            break;
        };
        let (before, tag) = (&rest[..at], &rest[at + 2..at + length]);
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(before);
        let tag = match word {
            "generation" => tag.replace(word, "if true"),
            "endgeneration" => tag.replace(word, "endif"),
            _ => tag.to_owned(),
        };
        out.push_str("{%");
        out.push_str(&tag);
        out.push_str("%}");
        rest = &rest[at + length + 2..];
    }
    out.push_str(rest);
    out
}

/// Refuses to grow without end.
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(std::io::Error::other("the rendered text is longer than 64 MiB"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
