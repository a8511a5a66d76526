//! Pickles as trees: what Python would build, and nothing of it built.
//!
//! A pickle is a program for a machine with a stack. This machine knows no functions:
//! where the program says to look a function up, there is a node with its name, where it
//! says to call one, there is a node with the name and the arguments. Whoever reads the
//! tree knows the few names that mean something.

use std::collections::HashMap;

/// Most bytes of one pickle.
pub(super) const MAX_PICKLE_LEN: u64 = 1 << 30;
/// Deepest nesting of marks.
const MAX_MARKS: usize = 10_000;
/// Bytes that a value takes in memory, in a container that grows by doubling.
const VALUE_BYTES: u64 = 32;
/// Bytes that a node takes, or an entry of the memo.
const NODE_BYTES: u64 = 96;

/// One value. Small ones are themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// UTF-8, as far as it is.
    Text(Span),
    Node(u32),
    /// Numbers and bytes that no tensor needs.
    Other,
}

/// A run of bytes of the pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    start: u32,
    len: u32,
}

/// What is made of values.
#[derive(Debug)]
pub(crate) enum Node {
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    /// A name that Python would import.
    Global {
        module: Span,
        name: Span,
    },
    /// What Python would get by a call, and what it would do to it then.
    Call {
        callee: Value,
        args: Value,
        state: Value,
        items: Vec<(Value, Value)>,
    },
    /// Something that the writer keeps elsewhere.
    Persistent(Value),
}

/// A pickle that was read.
#[derive(Debug)]
pub(crate) struct Tree {
    bytes: Vec<u8>,
    nodes: Vec<Node>,
    pub(crate) root: Value,
}

/// A pickle cannot be read.
#[derive(Debug)]
pub(crate) struct Bad {
    /// Offset in the pickle, in bytes.
    pub(crate) at: usize,
    pub(crate) why: String,
}

impl Tree {
    pub(crate) fn node(&self, value: Value) -> Option<&Node> {
        match value {
            Value::Node(index) => self.nodes.get(index as usize),
            _ => None,
        }
    }

    pub(crate) fn text(&self, value: Value) -> Option<&str> {
        match value {
            Value::Text(span) => self.str(span),
            _ => None,
        }
    }

    fn str(&self, span: Span) -> Option<&str> {
        let start = span.start as usize;
        let bytes = self.bytes.get(start..start + span.len as usize)?;
        std::str::from_utf8(bytes).ok()
    }

    /// Module and name of a global.
    pub(crate) fn global(&self, value: Value) -> Option<(&str, &str)> {
        match self.node(value)? {
            Node::Global { module, name } => Some((self.str(*module)?, self.str(*name)?)),
            _ => None,
        }
    }

    /// Members of a tuple or list.
    pub(crate) fn members(&self, value: Value) -> Option<&[Value]> {
        match self.node(value)? {
            Node::Tuple(members) | Node::List(members) => Some(members),
            _ => None,
        }
    }

    /// Every global that the pickle names.
    pub(crate) fn globals(&self) -> impl Iterator<Item = (&str, &str)> {
        let indexes = 0..self.nodes.len() as u32;
        indexes.filter_map(|index| self.global(Value::Node(index)))
    }
}

/// Reads a pickle; its tree takes at most `budget` bytes of memory.
pub(crate) fn parse(bytes: Vec<u8>, budget: u64) -> Result<Tree, Bad> {
    if bytes.len() as u64 > MAX_PICKLE_LEN {
        let why = format!("{} bytes are more than {MAX_PICKLE_LEN}", bytes.len());
        return Err(Bad { at: 0, why });
    }
    let mut machine = Machine {
        bytes: &bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        budget,
    };
    let mut at = 0;
    let root = loop {
        match machine.step() {
            Ok(None) => at = machine.at,
            Ok(Some(root)) => break root,
            Err(why) => return Err(Bad { at, why }),
        }
    };
    let nodes = machine.nodes;
    Ok(Tree { bytes, nodes, root })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Lengths of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    nodes: Vec<Node>,
    budget: u64,
}

type Step<T> = Result<T, String>;

impl Machine<'_> {
    /// One opcode; the root when that was the last.
    fn step(&mut self) -> Step<Option<Value>> {
        let [opcode] = self.array()?;
        match opcode {
            // Frames and versions change nothing.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'0' => match self.marks.last() == Some(&self.stack.len()) {
                true => drop(self.marks.pop()),
                false => drop(self.pop()?),
            },
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.top()?;
                self.push(top)?;
            }
            b'(' => {
                if self.marks.len() == MAX_MARKS {
                    return Err(format!("more than {MAX_MARKS} marks"));
                }
                self.spend(8)?;
                self.marks.push(self.stack.len());
            }
            b'N' => self.push(Value::None)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))?;
            }
            b'K' => {
                let [number] = self.array()?;
                self.push(Value::Int(number.into()))?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))?;
            }
            0x8a => {
                let [len] = self.array()?;
                self.long(len.into())?;
            }
            0x8b => {
                let len = u32::from_le_bytes(self.array()?);
                self.long(len.into())?;
            }
            b'I' | b'L' => {
                let line = self.line()?;
                let value = self.number(line, opcode);
                self.push(value)?;
            }
            b'F' => {
                self.line()?;
                self.push(Value::Other)?;
            }
            b'G' => {
                self.take(8)?;
                self.push(Value::Other)?;
            }
            b'S' | b'V' => {
                let line = self.line()?;
                let value = self.quoted(line, opcode);
                self.push(value)?;
            }
            b'U' | 0x8c => {
                let [len] = self.array()?;
                self.push_text(len.into())?;
            }
            b'T' | b'X' => {
                let len = u32::from_le_bytes(self.array()?);
                self.push_text(len.into())?;
            }
            0x8d => {
                let len = u64::from_le_bytes(self.array()?);
                self.push_text(len)?;
            }
            b'C' => {
                let [len] = self.array()?;
                self.skip_bytes(len.into())?;
            }
            b'B' => {
                let len = u32::from_le_bytes(self.array()?);
                self.skip_bytes(len.into())?;
            }
            0x8e | 0x96 => {
                let len = u64::from_le_bytes(self.array()?);
                self.skip_bytes(len)?;
            }
            b')' => self.push_node(Node::Tuple(Vec::new()))?,
            b']' | 0x8f => self.push_node(Node::List(Vec::new()))?,
            b'}' => self.push_node(Node::Dict(Vec::new()))?,
            b't' => {
                let members = self.pop_mark()?;
                self.push_node(Node::Tuple(members))?;
            }
            b'l' | 0x91 => {
                let members = self.pop_mark()?;
                self.push_node(Node::List(members))?;
            }
            b'd' => {
                let members = self.pop_mark()?;
                let items = pairs(&members)?;
                self.push_node(Node::Dict(items))?;
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let from = self.floor(count)?;
                let members = self.stack.split_off(from);
                self.push_node(Node::Tuple(members))?;
            }
            b'a' => {
                let value = self.pop()?;
                self.append(&[value])?;
            }
            b'e' | 0x90 => {
                let members = self.pop_mark()?;
                self.append(&members)?;
            }
            b's' => {
                let from = self.floor(2)?;
                let pair = self.stack.split_off(from);
                self.set_items(&pair)?;
            }
            b'u' => {
                let members = self.pop_mark()?;
                self.set_items(&members)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_node(Node::Global { module, name })?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (module, name) {
                    (Value::Text(module), Value::Text(name)) => {
                        self.push_node(Node::Global { module, name })?;
                    }
                    _ => return Err("the name of a global is no text".to_owned()),
                }
            }
            b'R' | 0x81 => {
                let (args, callee) = (self.pop()?, self.pop()?);
                self.call(callee, args)?;
            }
            0x92 => {
                let (_keywords, args, callee) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callee, args)?;
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                let members = self.pop_mark()?;
                self.push_node(Node::Global { module, name })?;
                let callee = self.pop()?;
                self.push_node(Node::Tuple(members))?;
                let args = self.pop()?;
                self.call(callee, args)?;
            }
            b'o' => {
                let members = self.pop_mark()?;
                let Some((&callee, args)) = members.split_first() else {
                    return Err("an object without a class".to_owned());
                };
                self.push_node(Node::Tuple(args.to_vec()))?;
                let args = self.pop()?;
                self.call(callee, args)?;
            }
            b'b' => {
                let new = self.pop()?;
                if let Some(Node::Call { state, .. }) = self.top_node()? {
                    *state = new;
                }
            }
            b'P' => {
                let line = self.line()?;
                self.push_node(Node::Persistent(Value::Text(line)))?;
            }
            b'Q' => {
                let value = self.pop()?;
                self.push_node(Node::Persistent(value))?;
            }
            b'p' | b'q' | b'r' => {
                let index = self.index(opcode, [b'p', b'q'])?;
                let top = self.top()?;
                self.memorize(index, top)?;
            }
            0x94 => {
                let index = self.memo.len() as u32;
                let top = self.top()?;
                self.memorize(index, top)?;
            }
            b'g' | b'h' | b'j' => {
                let index = self.index(opcode, [b'g', b'h'])?;
                match self.memo.get(&index) {
                    Some(&value) => self.push(value)?,
                    None => return Err(format!("nothing was remembered as {index}")),
                }
            }
            0x82..=0x84 => return Err("extension codes mean nothing here".to_owned()),
            0x97 | 0x98 => return Err("buffers outside of the pickle are not there".to_owned()),
            other => return Err(format!("opcode {other:#04x} does not exist")),
        }
        Ok(None)
    }

    fn take(&mut self, len: u64) -> Step<Span> {
        let rest = (self.bytes.len() - self.at) as u64;
        if len > rest {
            return Err(format!("{len} bytes are needed, {rest} are left"));
        }
        // Both fit: a pickle is shorter than 4 GiB.
        let span = Span {
            start: self.at as u32,
            len: len as u32,
        };
        self.at += len as usize;
        Ok(span)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let span = self.take(N as u64)?;
        let bytes = self
            .bytes
            .get(span.start as usize..)
            .and_then(|b| b.first_chunk());
        bytes.copied().ok_or_else(|| "the pickle ends".to_owned())
    }

    /// Up to the end of the line, which is left out.
    fn line(&mut self) -> Step<Span> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(len) = rest.iter().position(|&byte| byte == b'\n') else {
            return Err("a line does not end".to_owned());
        };
        let span = self.take(len as u64)?;
        self.take(1)?;
        Ok(span)
    }

    fn span_text(&self, span: Span) -> &str {
        let start = span.start as usize;
        let bytes = self.bytes.get(start..start + span.len as usize);
        std::str::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
    }

    fn number(&self, line: Span, opcode: u8) -> Value {
        let text = self.span_text(line);
        match text {
            "00" if opcode == b'I' => Value::Bool(false),
            "01" if opcode == b'I' => Value::Bool(true),
            _ => text
                .trim_end_matches('L')
                .parse()
                .map_or(Value::Other, Value::Int),
        }
    }

    /// What stands in quotes; anything with escapes is of no use here.
    fn quoted(&self, mut line: Span, opcode: u8) -> Value {
        let text = self.span_text(line);
        if text.contains('\\') {
            return Value::Other;
        }
        if opcode == b'S' {
            let is_quoted = text.len() >= 2 && text.starts_with(['\'', '"']);
            if !is_quoted {
                return Value::Other;
            }
            line = Span {
                start: line.start + 1,
                len: line.len - 2,
            };
        }
        Value::Text(line)
    }

    /// A little-endian number in two's complement.
    fn long(&mut self, len: u64) -> Step<()> {
        let span = self.take(len)?;
        let start = span.start as usize;
        let bytes = self.bytes.get(start..self.at).unwrap_or_default();
        let value = match bytes {
            [] => Value::Int(0),
            [.., top] if bytes.len() <= 8 => {
                let mut wide = [if top & 0x80 == 0 { 0 } else { 0xff }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(wide))
            }
            _ => Value::Other,
        };
        self.push(value)
    }

    fn push_text(&mut self, len: u64) -> Step<()> {
        let span = self.take(len)?;
        self.push(Value::Text(span))
    }

    fn skip_bytes(&mut self, len: u64) -> Step<()> {
        self.take(len)?;
        self.push(Value::Other)
    }

    fn spend(&mut self, bytes: u64) -> Step<()> {
        match self.budget.checked_sub(bytes) {
            Some(left) => self.budget = left,
            None => return Err("what it builds takes more memory than its file is long".to_owned()),
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Step<()> {
        self.spend(VALUE_BYTES)?;
        self.stack.push(value);
        Ok(())
    }

    fn push_node(&mut self, node: Node) -> Step<()> {
        self.spend(NODE_BYTES)?;
        let index = self.nodes.len() as u32;
        self.nodes.push(node);
        self.push(Value::Node(index))
    }

    fn call(&mut self, callee: Value, args: Value) -> Step<()> {
        let (state, items) = (Value::None, Vec::new());
        self.push_node(Node::Call {
            callee,
            args,
            state,
            items,
        })
    }

    /// Where the last `count` values begin, above the last mark.
    fn floor(&self, count: usize) -> Step<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(from) if from >= floor => Ok(from),
            _ => Err("the stack is empty".to_owned()),
        }
    }

    fn pop(&mut self) -> Step<Value> {
        self.floor(1)?;
        self.stack
            .pop()
            .ok_or_else(|| "the stack is empty".to_owned())
    }

    fn top(&self) -> Step<Value> {
        self.floor(1)?;
        self.stack
            .last()
            .copied()
            .ok_or_else(|| "the stack is empty".to_owned())
    }

    fn pop_mark(&mut self) -> Step<Vec<Value>> {
        match self.marks.pop() {
            Some(from) => {
                let values = self.stack.split_off(from);
                self.spend(values.len() as u64 * VALUE_BYTES)?;
                Ok(values)
            }
            None => Err("a mark is missing".to_owned()),
        }
    }

    fn top_node(&mut self) -> Step<Option<&mut Node>> {
        let top = self.top()?;
        Ok(match top {
            Value::Node(index) => self.nodes.get_mut(index as usize),
            _ => None,
        })
    }

    fn append(&mut self, values: &[Value]) -> Step<()> {
        self.spend(values.len() as u64 * VALUE_BYTES)?;
        match self.top_node()? {
            Some(Node::List(members)) => members.extend_from_slice(values),
            Some(Node::Call { .. }) => {}
            _ => return Err("something is appended to what is no list".to_owned()),
        }
        Ok(())
    }

    fn set_items(&mut self, values: &[Value]) -> Step<()> {
        self.spend(values.len() as u64 * VALUE_BYTES)?;
        let new = pairs(values)?;
        match self.top_node()? {
            Some(Node::Dict(items) | Node::Call { items, .. }) => items.extend(new),
            _ => return Err("an item is set in what is no dict".to_owned()),
        }
        Ok(())
    }

    fn index(&mut self, opcode: u8, [text, byte]: [u8; 2]) -> Step<u32> {
        if opcode == text {
            let line = self.line()?;
            let index = self.span_text(line).parse();
            return index.map_err(|_| "the index of the memo is no number".to_owned());
        }
        if opcode == byte {
            let [index] = self.array()?;
            return Ok(index.into());
        }
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn memorize(&mut self, index: u32, value: Value) -> Step<()> {
        self.spend(NODE_BYTES)?;
        self.memo.insert(index, value);
        Ok(())
    }
}

fn pairs(values: &[Value]) -> Step<Vec<(Value, Value)>> {
    if !values.len().is_multiple_of(2) {
        return Err("a key without a value".to_owned());
    }
    let pairs = values.chunks_exact(2);
    Ok(pairs
        .filter_map(|pair| Some((*pair.first()?, *pair.get(1)?)))
        .collect())
}
