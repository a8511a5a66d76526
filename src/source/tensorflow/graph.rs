//! The graph of objects that TensorFlow keeps beside a checkpoint: what the variables are
//! called, along which paths they are reached, and what belongs to an optimizer.

use super::super::{
    error::ContentError,
    protobuf::{Fields, Value},
};
use crate::plan::{MAX_ALIASES, MAX_ENTRY_NAME_LEN};
use std::collections::{HashMap, HashSet, VecDeque};

/// Key of the tensor that holds the graph.
pub(crate) const GRAPH_KEY: &str = "_CHECKPOINTABLE_OBJECT_GRAPH";
/// What follows the path of a variable in its key.
pub(crate) const VALUE_SUFFIX: &str = "/.ATTRIBUTES/VARIABLE_VALUE";
/// What stands between a variable, an optimizer and the slot that this keeps for it.
const SLOT_PART: &str = "/.OPTIMIZER_SLOT/";
/// List of an optimizer of Keras 3: what it trains.
const TRAINABLE_LIST: &str = "_trainable_variables";
/// The same: what it keeps for itself.
const OWN_LIST: &str = "_variables";
/// What variables are called after their place in such a list.
const LISTED_NAME: &str = "trainable_variables";
/// Most nodes of a graph.
const MAX_NODES: usize = 1 << 20;
/// Most bytes of all further names together.
const ALIASES_BYTES_MAX: usize = 4 << 20;

/// The graph, as it stands in its bytes.
#[derive(Debug, Default)]
pub(crate) struct Graph<'a> {
    /// What each node holds under which key; most hold nothing.
    values: Vec<Holding<'a>>,
    edges: Vec<Edge<'a>>,
    /// Nodes that an optimizer keeps for a variable.
    slots: HashSet<u32>,
    /// Nodes that keep such ones.
    slot_owners: HashSet<u32>,
    node_count: u32,
}

/// A variable of a node.
#[derive(Clone, Copy, Debug)]
struct Holding<'a> {
    node: u32,
    full_name: &'a str,
    key: &'a str,
}

/// A node has another under a name.
#[derive(Clone, Copy, Debug)]
struct Edge<'a> {
    parent: u32,
    child: u32,
    name: &'a str,
}

/// What the graph says of a variable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variable {
    /// The name that its maker gave it; others may have the same.
    pub(crate) given_name: String,
    pub(crate) aliases: Vec<String>,
    /// It belongs to an optimizer.
    pub(crate) is_optimizer: bool,
    /// Its place among the trainable variables that optimizers list.
    pub(crate) trainable_index: Option<u32>,
    pub(crate) node: u32,
}

impl Variable {
    /// What it is called by its way, where its key is this one: that of the key, but one over the
    /// model where the key leads over the optimizer's list of what it trains, and its place in that
    /// list where there is no other. `None` where that is too long.
    pub(crate) fn path_name(&self, key: &str) -> Option<String> {
        let own = key.strip_suffix(VALUE_SUFFIX).unwrap_or(key);
        let name = match self.trainable_index {
            Some(index) if is_over_optimizer(own) => {
                let way = self.aliases.iter().find(|way| !is_over_optimizer(way));
                way.cloned()
                    .unwrap_or_else(|| format!("{LISTED_NAME}/{index}"))
            }
            _ => own.to_owned(),
        };
        (1..=MAX_ENTRY_NAME_LEN)
            .contains(&name.len())
            .then_some(name)
    }

    /// The name that its maker gave it, where that says something.
    pub(crate) fn telling_name(&self) -> Option<&str> {
        // What TensorFlow calls a variable that nobody has named.
        let is_default = |name: &str| {
            let rest = name.strip_prefix("Variable");
            let number = rest.map(|rest| rest.strip_prefix('_').unwrap_or(rest));
            number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let name = &self.given_name[..];
        let is_usable = (1..=MAX_ENTRY_NAME_LEN).contains(&name.len()) && !name.contains('\0');
        (is_usable && !is_default(name)).then_some(name)
    }
}

/// What the graph says of all variables.
#[derive(Debug, Default)]
pub(crate) struct Variables {
    /// By key.
    pub(crate) by_key: HashMap<String, Variable>,
    /// Optimizers list the trainable variables.
    pub(crate) has_trainable: bool,
}

impl<'a> Graph<'a> {
    /// Reads a `TrackableObjectGraph`.
    pub(crate) fn parse(message: &'a [u8]) -> Result<Graph<'a>, ContentError> {
        let mut graph = Graph::default();
        for field in Fields::new(message) {
            let field = field?;
            if field.number == 1 {
                graph.read_node(field.value)?;
            }
        }
        let is_known = |&node: &u32| node < graph.node_count;
        if !graph.edges.iter().all(|edge| is_known(&edge.child))
            || !graph.slots.iter().all(is_known)
        {
            return Err(bad("the object graph names a node that it does not have"));
        }
        Ok(graph)
    }

    fn read_node(&mut self, message: Value<'a>) -> Result<(), ContentError> {
        let node = self.node_count;
        if node as usize == MAX_NODES {
            return Err(bad(format!(
                "an object graph of more than {MAX_NODES} nodes"
            )));
        }
        self.node_count += 1;
        for field in message.fields()? {
            let field = field?;
            match field.number {
                1 => {
                    let (child, name) = read_edge(field.value)?;
                    self.edges.push(Edge {
                        parent: node,
                        child,
                        name,
                    });
                }
                2 => {
                    let (mut full_name, mut key) = ("", "");
                    for field in field.value.fields()? {
                        let field = field?;
                        match field.number {
                            2 => full_name = field.value.text()?,
                            3 => key = field.value.text()?,
                            _ => {}
                        }
                    }
                    self.values.push(Holding {
                        node,
                        full_name,
                        key,
                    });
                }
                3 => {
                    self.slot_owners.insert(node);
                    for field in field.value.fields()? {
                        let field = field?;
                        if field.number == 3 {
                            self.slots.insert(field.value.count()?);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts together what is said of every variable.
    pub(crate) fn variables(&self) -> Variables {
        let paths = Paths::new(&self.edges, self.node_count);
        let optimizers = self.optimizers(&paths);
        let trainable = trainable(&optimizers, &paths);
        let own = own_of(&optimizers, &paths);
        let mut aliases_bytes = 0;
        let mut by_key = HashMap::new();
        for value in &self.values {
            let own_path = value.key.strip_suffix(VALUE_SUFFIX).unwrap_or(value.key);
            let trainable_index = trainable
                .as_ref()
                .and_then(|list| list.get(&value.node).copied());
            let is_slot = self.slots.contains(&value.node) || value.key.contains(SLOT_PART);
            let aliases = match is_slot {
                true => Vec::new(),
                false => paths.all_of(value.node, own_path, &mut aliases_bytes),
            };
            let variable = Variable {
                given_name: value.full_name.to_owned(),
                aliases,
                is_optimizer: trainable_index.is_none()
                    && (is_slot || own.contains(&value.node) || is_optimizer_path(own_path)),
                trainable_index,
                node: value.node,
            };
            by_key.insert(value.key.to_owned(), variable);
        }
        Variables {
            by_key,
            has_trainable: trainable.is_some(),
        }
    }

    /// The optimizers in their order, whatever leads to them: they count their steps or keep a
    /// learning rate beside lists of variables, or keep something for variables of others.
    fn optimizers(&self, paths: &Paths<'_, '_>) -> Vec<u32> {
        let is_optimizer = |&node: &u32| {
            let has = |name: &str| paths.children(node).iter().any(|edge| edge.name == name);
            let has_list = || has(TRAINABLE_LIST) || has(OWN_LIST);
            self.slot_owners.contains(&node)
                || (has_list()
                    && (has("_iterations")
                        || has("_learning_rate")
                        || paths.is_named(node, "optimizer")))
        };
        (0..self.node_count).filter(is_optimizer).collect()
    }
}

/// The place of each node that the optimizers of Keras 3 list as trainable: the first one's
/// list, then what the others have beside it.
fn trainable(optimizers: &[u32], paths: &Paths<'_, '_>) -> Option<HashMap<u32, u32>> {
    let mut places = HashMap::new();
    for list in lists(optimizers, TRAINABLE_LIST, paths) {
        let listed = paths.children(list).iter();
        let listed = listed.filter_map(|&edge| Some((edge.name.parse::<u32>().ok()?, edge.child)));
        let mut listed: Vec<(u32, u32)> = listed.collect();
        listed.sort_unstable();
        for (_, node) in listed {
            let place = places.len() as u32;
            places.entry(node).or_insert(place);
        }
    }
    (!places.is_empty()).then_some(places)
}

/// What the optimizers keep for themselves: their lists of variables, and what hangs on them.
fn own_of(optimizers: &[u32], paths: &Paths<'_, '_>) -> HashSet<u32> {
    let lists = lists(optimizers, OWN_LIST, paths);
    let holders = optimizers.iter().copied().chain(lists);
    holders
        .flat_map(|holder| paths.children(holder).iter().map(|edge| edge.child))
        .collect()
}

/// The lists of this name, each once.
fn lists(optimizers: &[u32], name: &str, paths: &Paths<'_, '_>) -> Vec<u32> {
    let children = optimizers.iter().flat_map(|&node| paths.children(node));
    let mut seen = HashSet::new();
    children
        .filter(|edge| edge.name == name && seen.insert(edge.child))
        .map(|edge| edge.child)
        .collect()
}

/// A name and the node behind it, of an `ObjectReference`.
pub(super) fn read_edge<'a>(message: Value<'a>) -> Result<(u32, &'a str), ContentError> {
    let (mut child, mut name) = (0, "");
    for field in message.fields()? {
        let field = field?;
        match field.number {
            1 => child = field.value.count()?,
            2 => name = field.value.text()?,
            _ => {}
        }
    }
    Ok((child, name))
}

/// Whether the variable of this path belongs to an optimizer.
pub(super) fn is_optimizer_path(path: &str) -> bool {
    path.contains(SLOT_PART) || path.split('/').any(|part| part == "optimizer")
}

/// Whether a way leads over an optimizer, or over its list of what it trains.
fn is_over_optimizer(path: &str) -> bool {
    is_optimizer_path(path) || path.split('/').any(|part| part == TRAINABLE_LIST)
}

/// How each node is reached first, from the root on and with the fewest steps.
struct Paths<'g, 'a> {
    /// Sorted by parent, in their order.
    edges: Vec<&'g Edge<'a>>,
    /// By child.
    incoming: Vec<&'g Edge<'a>>,
    first: Vec<Option<&'g Edge<'a>>>,
}

impl<'g, 'a> Paths<'g, 'a> {
    fn new(all: &'g [Edge<'a>], node_count: u32) -> Self {
        let mut edges: Vec<_> = all.iter().collect();
        edges.sort_by_key(|edge| edge.parent);
        let mut incoming = edges.clone();
        incoming.sort_by_key(|edge| edge.child);
        let mut paths = Paths {
            edges,
            incoming,
            first: vec![None; node_count as usize],
        };
        let mut waiting = VecDeque::from([0]);
        while let Some(node) = waiting.pop_front() {
            let range = range_of(&paths.edges, |edge| edge.parent, node);
            for index in range {
                let edge = paths.edges[index];
                if let Some(first @ None) = paths.first.get_mut(edge.child as usize)
                    && edge.child != 0
                {
                    *first = Some(edge);
                    waiting.push_back(edge.child);
                }
            }
        }
        paths
    }

    fn children(&self, node: u32) -> &[&'g Edge<'a>] {
        &self.edges[range_of(&self.edges, |edge| edge.parent, node)]
    }

    fn is_named(&self, node: u32, name: &str) -> bool {
        let range = range_of(&self.incoming, |edge| edge.child, node);
        self.incoming[range].iter().any(|edge| edge.name == name)
    }

    /// Every way to a node by the first way to one that has it, but for one.
    fn all_of(&self, node: u32, except: &str, aliases_bytes: &mut usize) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for edge in &self.incoming[range_of(&self.incoming, |edge| edge.child, node)] {
            let Some(path) = self.path(edge) else {
                continue;
            };
            if path == except || found.contains(&path) {
                continue;
            }
            *aliases_bytes += path.len();
            if found.len() == MAX_ALIASES || *aliases_bytes > ALIASES_BYTES_MAX {
                break;
            }
            found.push(path);
        }
        found
    }

    /// The way that ends with an edge; `None` where there is none or it is too long.
    fn path(&self, last: &Edge<'a>) -> Option<String> {
        let mut parts = vec![last.name];
        let (mut node, mut len) = (last.parent, last.name.len());
        while node != 0 {
            let edge = self.first.get(node as usize).copied().flatten()?;
            len += edge.name.len() + 1;
            if len > MAX_ENTRY_NAME_LEN {
                return None;
            }
            parts.push(edge.name);
            node = edge.parent;
        }
        parts.reverse();
        let path = parts.join("/");
        (1..=MAX_ENTRY_NAME_LEN)
            .contains(&path.len())
            .then_some(path)
            .filter(|path| !path.contains('\0'))
    }
}

/// Where the edges of a node are in a list that is sorted by that node.
fn range_of<'a>(
    edges: &[&Edge<'a>],
    node_of: impl Fn(&Edge<'a>) -> u32,
    node: u32,
) -> std::ops::Range<usize> {
    let start = edges.partition_point(|edge| node_of(edge) < node);
    let len = edges[start..].partition_point(|edge| node_of(edge) == node);
    start..start + len
}

fn bad(why: impl Into<String>) -> ContentError {
    ContentError::Malformed(why.into())
}
