// What Netron's reader finds in an ONNX file, as JSON: node netron_reads.mjs NETRON_FOLDER MODEL
import fs from 'fs';
import path from 'path';

const [folder, file] = process.argv.slice(2);
const load = (name) => import(path.join(folder, name));
const { BinaryStream } = await load('base.js');
const { ModelFactoryService } = await load('view.js');

const host = {
    environment: () => null,
    event: () => {},
    exception: (error) => { throw error; },
    require: (id) => load(`${id}.js`),
    request: async (name, encoding) => {
        const content = fs.readFileSync(path.join(folder, name));
        return encoding ? content.toString(encoding) : new BinaryStream(content);
    }
};
const context = {
    identifier: path.basename(file),
    stream: new BinaryStream(new Uint8Array(fs.readFileSync(file))),
    entries: new Map(),
    request: async (name) => { throw new Error(`there is no ${name}`); },
    require: host.require,
    error: (error) => { throw error; }
};
const model = await new ModelFactoryService(host).open(context);
const [graph] = model.modules;
const adders = graph.nodes.filter((node) => node.type.module === 'ai.anncvt');
process.stdout.write(JSON.stringify({
    metadata: model.metadata.map((entry) => entry.name).sort(),
    adders: adders.map((node) => ({
        name: node.name,
        attributes: node.attributes.map((attribute) => attribute.name).sort(),
        definition: node.type.nodes.length
    }))
}));
