//! A SavedModel: a folder with `saved_model.pb`, which knows the variables as objects, and a
//! checkpoint of their values.

use super::{
    super::{
        SourceError,
        builder::Builder,
        error::ContentError,
        files::OpenFile,
        protobuf::{Fields, Value, varint},
        view::{Refusal, View},
    },
    Facts,
    graph::read_edge,
};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// File that makes a folder a SavedModel.
pub(crate) const MODEL_FILE: &str = "saved_model.pb";
/// Longest graph of objects in it that is read.
const MAX_OBJECTS_LEN: u64 = 256 << 20;
/// Most bytes before the content of a field: two numbers.
const MAX_FIELD_HEAD_LEN: u64 = 20;
/// Most objects of a model.
const MAX_NODES: usize = 1 << 20;

/// Loads the variables of a SavedModel, or says `false` when the folder is none.
pub(in crate::source) fn load(folder: &Path, builder: &mut Builder) -> Result<bool, SourceError> {
    let path = folder.join(MODEL_FILE);
    if !path.is_file() {
        return Ok(false);
    }
    let file = OpenFile::open(&path)?;
    if file.byte_len() == 0 {
        // No message has fewer bytes, but this one has at least a graph.
        return Err(SourceError::malformed(&path, "it is empty"));
    }
    let view = View::file(&file);
    let found = object_graph(view).map_err(|refusal| refusal.of(&path))?;
    let model = match found.unwrap_or_default() {
        (offset, len @ ..=MAX_OBJECTS_LEN) => {
            let bytes = file.bytes_at(offset, len)?;
            SavedModel::parse(&bytes).map_err(|error| SourceError::content(&path, error))?
        }
        (_, len) => {
            let why = format!(
                "its objects take {len} bytes, more than {MAX_OBJECTS_LEN}: what is trainable is not read"
            );
            builder.skip(MODEL_FILE, why);
            SavedModel::default()
        }
    };
    let index = folder.join("variables").join("variables.index");
    let index_file = OpenFile::open(&index).map_err(|error| match error {
        SourceError::NotFound { .. } => SourceError::malformed(
            folder,
            "it is a SavedModel without variables/variables.index: it has no values",
        ),
        error => error,
    })?;
    super::load_with(&index, &index_file, builder, |variable| {
        model.facts(variable.node, &variable.given_name)
    })?;
    builder.add_format("savedmodel");
    Ok(true)
}

/// What a model says of its variables.
#[derive(Debug, Default)]
pub(crate) struct SavedModel {
    /// By the number of the object, which is the same in the graph beside the values.
    pub(crate) variables: HashMap<u32, SavedVariable>,
    /// The model itself lists its variables in their order.
    pub(crate) is_ordered: bool,
}

/// What a model says of one variable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedVariable {
    pub(crate) name: String,
    /// It was made to be trained. Keras leaves this as it is when a layer is frozen later.
    pub(crate) trainable: bool,
    /// It stands in the model's list of trainable variables; `None` without such a list.
    pub(crate) listed: Option<bool>,
    /// Its place among the variables of the model.
    pub(crate) place: Option<u32>,
}

/// An object.
#[derive(Debug, Default)]
struct Node<'a> {
    children: Vec<(u32, &'a str)>,
    kind: Kind<'a>,
}

#[derive(Debug, Default)]
enum Kind<'a> {
    #[default]
    Other,
    Module,
    /// A list or dictionary.
    Container,
    Variable {
        name: &'a str,
        trainable: bool,
    },
}

impl SavedModel {
    /// Reads a `SavedObjectGraph`.
    pub(crate) fn parse(message: &[u8]) -> Result<SavedModel, ContentError> {
        Ok(describe(&read_nodes(message)?))
    }

    /// What is known of a variable, where number and name agree.
    fn facts(&self, node: u32, name: &str) -> Option<Facts> {
        let variable = self.variables.get(&node).filter(|v| v.name == name)?;
        Some(Facts {
            listed: variable.listed,
            trainable: Some(variable.trainable),
            place: variable.place,
            is_ordered: self.is_ordered,
        })
    }
}

/// Where the graph of objects lies in a `SavedModel`: that of the first of its graphs which has
/// one, for others are the same for other devices. Their operations, nearly all of the file, are
/// passed over.
pub(crate) fn object_graph(view: View<'_>) -> Result<Option<(u64, u64)>, Refusal> {
    let mut at = 0;
    while let Some(field) = next_field(view, &mut at, view.byte_len())? {
        let (2, offset, len) = field else { continue };
        let mut at = offset;
        while let Some(field) = next_field(view, &mut at, offset + len)? {
            if let (7, offset, len) = field {
                return Ok(Some((offset, len)));
            }
        }
    }
    Ok(None)
}

/// The number of the field at a place, and where its bytes lie if it has some of its own, which
/// are not read; `None` at the end of the message. Moves on to the next one.
fn next_field(view: View<'_>, at: &mut u64, end: u64) -> Result<Option<(u32, u64, u64)>, Refusal> {
    let start = *at;
    if start >= end {
        return Ok(None);
    }
    let head = view.read(start, (end - start).min(MAX_FIELD_HEAD_LEN))?;
    let bad = |why: &str| view.malformed(start, why);
    let mut rest = &head[..];
    let mut number = || varint(&mut rest).map_err(|_| bad("a number that does not end"));
    let tag = number()?;
    let len = match tag & 7 {
        0 => {
            number()?;
            0
        }
        1 => 8,
        2 => number()?,
        5 => 4,
        kind => return Err(bad(&format!("a field of the unknown kind {kind}"))),
    };
    let offset = start + (head.len() - rest.len()) as u64;
    let next = offset.checked_add(len).filter(|&next| next <= end);
    *at = next.ok_or_else(|| bad("a message that is cut off"))?;
    let has_bytes = tag & 7 == 2;
    let field = u32::try_from(tag >> 3).ok().filter(|_| has_bytes);
    Ok(Some((field.unwrap_or(0), offset, len)))
}

fn read_nodes(graph: &[u8]) -> Result<Vec<Node<'_>>, ContentError> {
    let mut nodes = Vec::new();
    for field in Fields::new(graph) {
        let field = field?;
        if field.number != 1 {
            continue;
        }
        if nodes.len() == MAX_NODES {
            let why = format!("a model of more than {MAX_NODES} objects");
            return Err(ContentError::Malformed(why));
        }
        nodes.push(read_node(field.value)?);
    }
    Ok(nodes)
}

fn read_node<'a>(message: Value<'a>) -> Result<Node<'a>, ContentError> {
    let mut node = Node::default();
    for field in message.fields()? {
        let field = field?;
        match field.number {
            1 => node.children.push(read_edge(field.value)?),
            4 => {
                node.kind = Kind::Module;
                for field in field.value.fields()? {
                    let field = field?;
                    if field.number == 1 && field.value.text()?.ends_with("_wrapper") {
                        node.kind = Kind::Container;
                    }
                }
            }
            7 => {
                let (mut name, mut trainable) = ("", false);
                for field in field.value.fields()? {
                    let field = field?;
                    match field.number {
                        3 => trainable = field.value.number()? != 0,
                        6 => name = field.value.text()?,
                        _ => {}
                    }
                }
                node.kind = Kind::Variable { name, trainable };
            }
            _ => {}
        }
    }
    Ok(node)
}

fn describe(nodes: &[Node<'_>]) -> SavedModel {
    let all = list(nodes, "variables");
    let trainable_list: Option<HashSet<u32>> = list(nodes, "trainable_variables").map(|list| {
        let children = nodes.get(list as usize).map(|node| &node.children[..]);
        let children = children.unwrap_or_default().iter();
        children.map(|(child, _)| *child).collect()
    });
    let order = order(nodes, all.unwrap_or(0));
    let places: HashMap<u32, u32> = (0..)
        .zip(order)
        .map(|(place, node)| (node, place))
        .collect();
    let variables = (0..)
        .zip(nodes)
        .filter_map(|(number, node)| match node.kind {
            Kind::Variable { name, trainable } => Some((
                number,
                SavedVariable {
                    name: name.to_owned(),
                    trainable,
                    listed: trainable_list.as_ref().map(|list| list.contains(&number)),
                    place: places.get(&number).copied(),
                },
            )),
            _ => None,
        });
    SavedModel {
        variables: variables.collect(),
        is_ordered: all.is_some(),
    }
}

/// The list of this name that Keras keeps at the root of what it exports.
fn list(nodes: &[Node<'_>], name: &str) -> Option<u32> {
    let is_list = |&&(child, called): &&(u32, &str)| {
        let kind = nodes.get(child as usize).map(|node| &node.kind);
        called == name && matches!(kind, Some(Kind::Container))
    };
    nodes
        .first()?
        .children
        .iter()
        .find(is_list)
        .map(|(child, _)| *child)
}

/// The variables below an object in the order of the model: that of a list, or that in
/// which a module of TensorFlow finds its own.
fn order(nodes: &[Node<'_>], top: u32) -> Vec<u32> {
    let children = |node: u32| {
        nodes
            .get(node as usize)
            .map_or(&[][..], |n| &n.children[..])
    };
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut modules = vec![top];
    // The leaves of a module by the names of its attributes, then the modules in it.
    while let Some(module) = modules.pop() {
        let mut inner = Vec::new();
        let mut waiting = in_order(children(module));
        while let Some(node) = waiting.pop() {
            if !seen.insert(node) {
                continue;
            }
            match nodes.get(node as usize).map(|node| &node.kind) {
                Some(Kind::Variable { .. }) => found.push(node),
                Some(Kind::Container) => waiting.extend(in_order(children(node))),
                Some(Kind::Module) => inner.push(node),
                _ => {}
            }
        }
        inner.reverse();
        modules.extend(inner);
    }
    found
}

/// Children in the order of their names, or of their places in a list; the last first.
fn in_order(children: &[(u32, &str)]) -> Vec<u32> {
    let mut sorted: Vec<_> = children.iter().collect();
    let place = |name: &str| name.parse::<u32>().ok();
    sorted.sort_by(|(_, a), (_, b)| match (place(a), place(b)) {
        (Some(a), Some(b)) => a.cmp(&b),
        (a_place, b_place) => (a_place.is_none(), a).cmp(&(b_place.is_none(), b)),
    });
    sorted.iter().rev().map(|(child, _)| *child).collect()
}
