//! What a row means: plain text, or a conversation (alpaca, sharegpt, openai), as LLaMA-Factory reads them.
//!
//! Owns the reading of columns, by a dataset's layout or by looking at the row. It must not know files, templates or tokens.

use super::conversation::{Conversation, Reason, Role, Tags, Turn, aligned, tools};
use super::dataset_info::{Columns, Formatting, Layout};
use super::rows::{Fields, Row};
use serde_json::{Map, Value};

/// What one row says.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Text as it is, no chat template.
    Text(String),
    /// Turns, for the chat template.
    Conversation(Conversation),
}

/// One row, understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Its text; placeholders of media that the row carries are removed.
    pub content: Content,
    /// The row carries images, videos or audios, which a text-only run does not use.
    pub has_media: bool,
    /// The row carries a rejected or a second answer that is not used.
    pub has_unused_answer: bool,
}

/// How the rows of a source are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Reading {
    /// Each row shows what it is by its columns.
    #[default]
    Detect,
    /// The column of this name is plain text.
    TextColumn(String),
    /// As dataset_info.json says.
    Layout(Box<Layout>),
}

/// Understands a row, or says why it cannot be used.
pub fn understand(row: Row, reading: &Reading) -> Result<Document, Reason> {
    let fields = match row {
        Row::Unusable(reason) => return Err(reason.into()),
        Row::Text(text) => return plain(text, false),
        Row::Fields(fields) => fields,
    };
    match reading {
        Reading::TextColumn(column) => text_column(&fields, column),
        Reading::Layout(layout) => by_layout(&fields, layout),
        Reading::Detect => {
            let known = |name: &&str| fields.get(*name).is_some_and(|v| !v.is_null());
            if let Some(name) = ["messages", "conversations"].iter().find(|n| known(n)) {
                by_layout(&fields, &detected_messages(&fields, name))
            } else if known(&"instruction") {
                by_layout(&fields, &detected_alpaca(&fields))
            } else if known(&"text") {
                text_column(&fields, "text")
            } else {
                Err("no column text, messages, conversations or instruction".into())
            }
        }
    }
}

fn plain(text: String, has_media: bool) -> Result<Document, Reason> {
    if text.trim().is_empty() {
        return Err("the text is empty".into());
    }
    Ok(Document {
        content: Content::Text(text),
        has_media,
        has_unused_answer: false,
    })
}

fn text_column(fields: &Fields, column: &str) -> Result<Document, Reason> {
    match fields.get(column) {
        Some(Value::String(text)) => {
            let media = Media::of(fields, &detected_columns(fields));
            plain(media.without_placeholders(text), media.any())
        }
        Some(Value::Null) => Err("the text is empty".into()),
        Some(_) => Err(format!("column {column} is not text").into()),
        None => Err(format!("no column {column}").into()),
    }
}

fn detected_columns(fields: &Fields) -> Columns {
    let first = |names: [&str; 2]| {
        let found = names.into_iter().find(|name| fields.contains_key(*name));
        found.map(str::to_owned)
    };
    Columns {
        system: first(["system", "system_prompt"]),
        tools: first(["tools", "functions"]),
        images: first(["images", "image"]),
        videos: first(["videos", "video"]),
        audios: first(["audios", "audio"]),
        history: first(["history", "history"]),
        ..Columns::default()
    }
}

fn detected_messages(fields: &Fields, column: &str) -> Layout {
    let messages = json_column(&fields[column]);
    let openai = messages.get(0).is_some_and(|m| m.get("role").is_some());
    let formatting = match openai {
        true => Formatting::Openai(Tags {
            lenient: true,
            ..Tags::openai()
        }),
        false => Formatting::Sharegpt(Tags {
            lenient: true,
            ..Tags::sharegpt()
        }),
    };
    let columns = Columns {
        messages: Some(column.to_owned()),
        ..detected_columns(fields)
    };
    Layout {
        columns,
        ..Layout::of(formatting)
    }
}

fn detected_alpaca(fields: &Fields) -> Layout {
    let response = match fields.contains_key("output") {
        true => "output",
        false => "response",
    };
    let columns = Columns {
        prompt: Some("instruction".into()),
        query: Some("input".into()),
        response: Some(response.into()),
        ..detected_columns(fields)
    };
    Layout {
        columns,
        ..Layout::of(Formatting::Alpaca)
    }
}

fn by_layout(fields: &Fields, layout: &Layout) -> Result<Document, Reason> {
    let columns = &layout.columns;
    let mut media = Media::of(fields, columns);
    let mut turns = match &layout.formatting {
        Formatting::Alpaca if columns.response.is_none() && columns.chosen.is_none() => {
            return plain(media.without_placeholders(&prompt(fields, columns)), media.any());
        }
        Formatting::Alpaca => alpaca(fields, layout, &media)?,
        Formatting::Sharegpt(tags) | Formatting::Openai(tags) => messages(fields, layout, tags, &mut media)?,
    };
    let offered = match &columns.tools {
        Some(column) => tools(fields.get(column).unwrap_or(&Value::Null))?,
        None => Vec::new(),
    };
    if turns
        .iter()
        .all(|t| t.text.trim().is_empty() && t.extra.is_empty())
    {
        return Err("the text is empty".into());
    }
    turns.shrink_to_fit();
    Ok(Document {
        content: Content::Conversation(Conversation {
            turns,
            tools: offered,
        }),
        has_media: media.any(),
        has_unused_answer: layout.ranking,
    })
}

/// Instruction and input, joined by a newline.
fn prompt(fields: &Fields, columns: &Columns) -> String {
    let parts = [&columns.prompt, &columns.query];
    let parts = parts.into_iter().flatten();
    let parts = parts.filter_map(|column| fields.get(column)?.as_str());
    parts.filter(|p| !p.is_empty()).collect::<Vec<_>>().join("\n")
}

fn alpaca(fields: &Fields, layout: &Layout, media: &Media) -> Result<Vec<Turn>, Reason> {
    let columns = &layout.columns;
    let mut turns = Vec::new();
    let history = columns.history.as_ref().and_then(|c| fields.get(c));
    let history = history.map(json_column);
    for pair in history.iter().flat_map(|h| h.as_array()).flatten() {
        let [Some(asked), Some(answered)] = [0, 1].map(|i| pair.get(i).and_then(Value::as_str)) else {
            return Err("the history is no list of pairs of texts".into());
        };
        turns.push(Turn::new(Role::User, media.without_placeholders(asked)));
        turns.push(Turn::new(Role::Assistant, answered));
    }
    let asked = prompt(fields, columns);
    if asked.trim().is_empty() {
        return Err("the instruction is empty".into());
    }
    turns.push(Turn::new(Role::User, media.without_placeholders(&asked)));
    let answer = match layout.ranking {
        true => &columns.chosen,
        false => &columns.response,
    };
    match answer.as_ref().and_then(|c| fields.get(c)) {
        Some(Value::String(answer)) => turns.push(Turn::new(Role::Assistant, answer.as_str())),
        _ => return Err("the row has no answer".into()),
    }
    aligned(turns, system(fields, columns), false)
}

fn system<'a>(fields: &'a Fields, columns: &Columns) -> Option<&'a str> {
    fields.get(columns.system.as_ref()?)?.as_str()
}

fn messages(fields: &Fields, layout: &Layout, tags: &Tags, media: &mut Media) -> Result<Vec<Turn>, Reason> {
    let columns = &layout.columns;
    let Some(column) = &columns.messages else {
        return Err("the dataset names no messages column".into());
    };
    let Some(value) = fields.get(column) else {
        return Err(format!("no column {column}").into());
    };
    let value = json_column(value);
    let Some(list) = value.as_array() else {
        return Err(format!("column {column} is no list of messages").into());
    };
    let chosen = columns.chosen.as_ref().filter(|_| layout.ranking);
    let chosen = chosen.and_then(|c| fields.get(c));
    let mut turns = Vec::with_capacity(list.len() + 1);
    for message in list {
        turns.push(turn(message, tags, media)?);
    }
    let mut turns = aligned(turns, system(fields, columns), chosen.is_some())?;
    if let Some(chosen) = chosen {
        let answer = turn(chosen, tags, media)?;
        if !matches!(answer.role, Role::Assistant | Role::FunctionCall) {
            return Err("the chosen answer is not the assistant's".into());
        }
        turns.push(answer);
    }
    Ok(turns)
}

fn turn(message: &Value, tags: &Tags, media: &mut Media) -> Result<Turn, Reason> {
    let Some(message) = message.as_object() else {
        return Err("a message is no JSON object".into());
    };
    let name = message.get(&tags.role).and_then(Value::as_str);
    let Some(role) = name.and_then(|name| tags.find(name)) else {
        return Err("a message has no known role".into());
    };
    let mut extra: Map<String, Value> = message
        .iter()
        .filter(|(key, value)| **key != tags.role && **key != tags.content && !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if tags.role != "role" {
        extra.clear();
    }
    let calls = extra.get("tool_calls").and_then(Value::as_array);
    let calls = calls.is_some_and(|calls| !calls.is_empty());
    let text = match message.get(&tags.content) {
        Some(Value::String(text)) => media.without_placeholders(text),
        Some(Value::Array(parts)) => joined(parts, media)?,
        None | Some(Value::Null) if calls => String::new(),
        _ => return Err("a message has no text".into()),
    };
    Ok(Turn { role, text, extra })
}

/// The text of a list of parts; other parts count as media.
fn joined(parts: &[Value], media: &mut Media) -> Result<String, Reason> {
    let mut text = String::new();
    for part in parts {
        let kind = part.get("type").and_then(Value::as_str);
        match (part.as_str().or(part.get("text").and_then(Value::as_str)), kind) {
            (Some(said), None | Some("text")) => text.push_str(said),
            (_, Some("image" | "image_url")) => media.images = true,
            (_, Some("video" | "video_url")) => media.videos = true,
            (_, Some("audio" | "audio_url" | "input_audio")) => media.audios = true,
            _ => return Err("a message has a part that is neither text nor media".into()),
        }
    }
    Ok(text)
}

/// Lists in .csv cells, and in some .parquet columns, stand there as JSON text.
fn json_column(value: &Value) -> Value {
    match value {
        Value::String(text) if text.trim_start().starts_with('[') => {
            serde_json::from_str(text).unwrap_or(Value::Null)
        }
        other => other.clone(),
    }
}

/// Which media a row carries.
struct Media {
    images: bool,
    videos: bool,
    audios: bool,
}

impl Media {
    fn of(fields: &Fields, columns: &Columns) -> Self {
        let carried = |column: &Option<String>| match column.as_ref().and_then(|c| fields.get(c)) {
            None | Some(Value::Null) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::String(text)) => !matches!(text.trim(), "" | "[]"),
            Some(_) => true,
        };
        Self {
            images: carried(&columns.images),
            videos: carried(&columns.videos),
            audios: carried(&columns.audios),
        }
    }

    fn any(&self) -> bool {
        self.images || self.videos || self.audios
    }

    /// The text without `<image>` and the like, each with the line end after it.
    fn without_placeholders(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (carried, tag) in [
            (self.images, "<image>"),
            (self.videos, "<video>"),
            (self.audios, "<audio>"),
        ] {
            if carried && text.contains(tag) {
                text = text.replace(&format!("{tag}\n"), "").replace(tag, "");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The turns as `role:text`, joined by `|`, or the text, or the reason after `!`.
    fn shown(row: Value, reading: &Reading) -> String {
        let row = row.as_object().cloned().map(Row::Fields);
        match understand(row.unwrap_or(Row::Unusable("no object")), reading) {
            Err(reason) => format!("!{reason}"),
            Ok(document) => match document.content {
                Content::Text(text) => text,
                Content::Conversation(c) => {
                    let turns = c.turns.iter().map(|t| format!("{:?}:{}", t.role, t.text));
                    turns.collect::<Vec<_>>().join("|")
                }
            },
        }
    }

    #[test]
    fn rows_show_what_they_are() {
        let check = |row: Value, expect: &str| {
            assert_eq!(shown(row.clone(), &Reading::Detect), expect, "{row}");
        };
        check(json!({"text": "a"}), "a");
        check(json!({"text": " "}), "!the text is empty");
        check(json!({"text": 3}), "!column text is not text");
        check(
            json!({"x": "a"}),
            "!no column text, messages, conversations or instruction",
        );
        check(
            json!({"instruction": "a", "input": "b", "output": "c"}),
            "User:a\nb|Assistant:c",
        );
        check(
            json!({"instruction": "a", "input": "", "output": "c", "system": "s"}),
            "System:s|User:a|Assistant:c",
        );
        check(
            json!({"instruction": "a", "output": "c", "history": [["x", "y"]]}),
            "User:x|Assistant:y|User:a|Assistant:c",
        );
        check(
            json!({"instruction": "a", "output": "c", "history": [["x"]]}),
            "!the history is no list of pairs of texts",
        );
        check(json!({"instruction": "a"}), "!the row has no answer");
        check(
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            "User:a|Assistant:b",
        );
        check(
            json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "x"}]},
                {"role": "assistant", "content": "b"}]}),
            "System:s|User:a|Assistant:b",
        );
        check(
            json!({"messages": "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]"}),
            "User:a|Assistant:b",
        );
        check(
            json!({"messages": "x"}),
            "!column messages is no list of messages",
        );
        check(json!({"messages": [3]}), "!a message is no JSON object");
        check(
            json!({"messages": [{"role": "user", "content": 3}]}),
            "!a message has no text",
        );
        check(
            json!({"messages": [{"role": "wizard", "content": "a"}]}),
            "!a message has no known role",
        );
        check(
            json!({"messages": [{"role": "user", "content": "<image>\nWho?<image>"}, {"role": "assistant", "content": "b"}], "images": ["1.jpg", "2.jpg"]}),
            "User:Who?|Assistant:b",
        );
        check(
            json!({"messages": [{"role": "user", "content": "an <image> tag"}, {"role": "assistant", "content": "b"}], "images": []}),
            "User:an <image> tag|Assistant:b",
        );
    }

    #[test]
    fn layouts_bind() {
        let check = |layout: Layout, row: Value, expect: &str| {
            let reading = Reading::Layout(Box::new(layout));
            assert_eq!(shown(row.clone(), &reading), expect, "{row}");
        };
        let name = |n: &str| Some(n.to_owned());
        let text = Layout {
            columns: Columns {
                prompt: name("text"),
                ..Columns::default()
            },
            ..Layout::of(Formatting::Alpaca)
        };
        check(text, json!({"text": "plain"}), "plain");
        let strict = Layout::of(Formatting::Sharegpt(Tags::sharegpt()));
        check(
            strict.clone(),
            json!({"conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            "!a message has no known role",
        );
        let ranked = Layout {
            ranking: true,
            columns: Columns {
                chosen: name("chosen"),
                ..strict.columns
            },
            ..strict
        };
        check(
            ranked,
            json!({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}),
            "User:a|Assistant:good",
        );
        assert_eq!(
            shown(json!({"body": "b"}), &Reading::TextColumn("body".into())),
            "b"
        );
        assert_eq!(
            shown(json!({"text": "b"}), &Reading::TextColumn("body".into())),
            "!no column body"
        );
    }
}
